"""The attention function and the mask function that transformers calls in every layer and once per forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.adapters.unsupported import refuse
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.sequence import SequenceMeta

# Arguments that models hand down and that change nothing in attention. Any other one that is set is refused by its name.
_IGNORED = {
    *("position_ids", "position_embeddings", "cache_position", "past_key_values", "use_cache", "logits_to_keep"),
    *("labels", "shift_labels", "num_items_in_batch", "return_dict", "output_hidden_states", "output_router_logits"),
}
_REMEDIES = {
    "softcap": "set attn_logit_softcapping=None in the model's config, or train it unsharded",
    "output_attentions": "attention weights of a split sequence are never in one place; leave output_attentions off",
    "position_bias": "use a model with rotary or absolute positions",
    "cu_seq_lens_q": "give shard_batch the borders of the whole sequence as cu_seqlens",
}
# The building blocks of transformers' mask functions that say no more than causal, window and documents.
_KNOWN_MASKS = {
    *("causal_mask_function", "and_masks", "sliding_window_overlay"),
    *("packed_sequence_mask_function", "remap_positions_for_packed_sequence"),
}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    sequence: SequenceMeta | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over the whole sequence, for transformers' attention interface.

    Args:
        query: [B, H, T, D]; key: [B, Hkv, T, D]; value: [B, Hkv, T, Dv] with Dv <= D; T tokens of this rank.
        sliding_window: tokens that a token sees, itself included; None: all before it.
        s_aux: [H], learned attention sinks (GPT-OSS).
        sequence: from shard_batch, through the model's keyword arguments.

    Returns:
        [B, T, H, Dv] and None in place of attention weights.
    """
    if sequence is None:
        raise ValueError(
            f"{type(module).__name__} got no sharded sequence: call model(**shard_batch(...)) (if you did, this model does not"
            " hand its keyword arguments down and cannot be split); to run it unsharded, model.set_attn_implementation('sdpa')"
        )
    _check(module, query, key, attention_mask, dropout, is_causal, sliding_window, kwargs)
    padding = query.shape[-1] - value.shape[-1]
    if padding < 0:
        raise refuse(f"value heads of {value.shape[-1]} with query heads of {query.shape[-1]}", "they may only be smaller")
    if padding:
        value = F.pad(value, (0, padding))  # latent attention; the kernels want one head size
    out, _ = sequence_parallel_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        layout=sequence.layout,
        mask=sequence.mask(sliding_window),
        group=sequence.group,
        strategy=sequence.strategy(sliding_window),
        scale=scaling,
        sinks=s_aux,
        need_lse=False,
    )
    return (out[..., :-padding] if padding else out), None


def no_mask(
    *, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, use_vmap: bool = False, **_: Any
) -> None:
    """For transformers' mask interface: builds nothing, and refuses what `attention` would otherwise not hear of.

    transformers describes a mask by nested closures; any building block that is not known to be harmless is refused.
    """
    if attention_mask is not None and not attention_mask.all():
        raise refuse("padding masks", "give shard_batch the documents' borders; what lies beyond the last one is padding")
    unknown = sorted(set(_building_blocks(mask_function)) - _KNOWN_MASKS)
    if unknown or use_vmap:
        raise refuse(f"the attention pattern of this model ({', '.join(unknown)})", "only causal, windows and documents")


def _building_blocks(function: Callable[..., Any]) -> Iterator[str]:
    yield function.__qualname__.partition(".")[0]
    for cell in function.__closure__ or ():
        inner = cell.cell_contents
        for part in inner if isinstance(inner, tuple) else (inner,):
            if callable(part) and not isinstance(part, Tensor):
                yield from _building_blocks(part)


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    window: int | None,
    kwargs: dict[str, Any],
) -> None:
    name = type(module).__name__
    if mask is not None:
        raise refuse("attention masks given as a tensor", "describe documents to shard_batch and leave attention_mask out")
    if dropout:
        raise refuse(f"attention dropout {dropout:g}", "set attention_dropout=0 in the model's config")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise refuse(f"bidirectional or cross attention ({name})", "only causal self-attention")
    if key.shape[2] != query.shape[2]:
        raise refuse("key-value caches", "train with use_cache=False, as shard_batch says")
    for argument, value in kwargs.items():
        if value is not None and value is not False and argument not in _IGNORED:
            raise refuse(f"the argument {argument!r} of {name}", _REMEDIES.get(argument, "leave it out"))
    types, layer = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    sliding = layer is None or types is None or types[layer] == "sliding_attention"
    if window is None and sliding and getattr(module.config, "sliding_window", None):
        raise refuse(f"the window of {name}", "the model does not tell the attention interface about it")
