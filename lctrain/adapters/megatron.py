"""megatron-core's core attention with the sequence split over its context-parallel ranks, without Transformer Engine.

    spec = use_sequence_parallel_attention(get_gpt_layer_local_spec(), strategy="ring")
    model = GPTModel(config, spec, ...)  # config.context_parallel_size > 1 works

megatron-core cuts sequences in zigzag everywhere (`get_batch_on_this_cp_rank`, rotary embedding): context-parallel rank r of W
owns blocks r and 2W-1-r. That is our zigzag layout, so tensors are used as they come.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from lctrain.adapters.unsupported import refuse
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.strategy import Strategy

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def use_sequence_parallel_attention(spec: Any, strategy: str | Strategy = "ring") -> Any:
    """A copy of a layer spec (or of a block's list of them) whose core attention is `SequenceParallelAttention`.

    strategy: how attention moves tensors: "ring", "ulysses", ... or a Strategy with its degrees. It takes the place of
        `cp_comm_type`.
    """
    spec = copy.deepcopy(spec)
    replaced = 0
    for layer in getattr(spec, "layer_specs", [spec]):
        attention = getattr(getattr(layer, "submodules", None), "self_attention", None)
        parts = getattr(attention, "submodules", None)
        if parts is not None and hasattr(parts, "core_attention"):
            parts.core_attention = ModuleSpec(SequenceParallelAttention, params={"strategy": strategy})
            replaced += 1
    if not replaced:
        raise ValueError("this spec has no self_attention with a core_attention: give a transformer layer's ModuleSpec")
    return spec


class SequenceParallelAttention(MegatronModule):
    """Drop-in for DotProductAttention and TEDotProductAttention; heads may be split by tensor parallelism as usual.

    Raises:
        UnsupportedError: the config or a call asks for something that it does not do; the message names it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        strategy: str | Strategy = "ring",
    ) -> None:
        super().__init__(config=config)
        _check_config(config, attention_type, config.attention_dropout if attention_dropout is None else attention_dropout)
        self.attn_mask_type, self.softmax_scale, self.strategy = attn_mask_type, softmax_scale, strategy
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed and config.window_size[0] >= 0 else None  # it counts itself
        given = getattr(pg_collection, "cp", None)
        self.group = RankGroup(parallel_state.get_context_parallel_group() if given is None else given)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, b, n, h], key, value [s, b, g, h] -> [s, b, n*h], with s tokens of this rank.

        packed_seq_params: with qkv_format "sbhd", `cu_seqlens_q` are document borders in the whole sequence, which is cut in
            zigzag as one. With "thd" (tensors [t, n, h]) every document is cut in zigzag by itself, as Transformer Engine
            wants it; each then needs its own round of messages, so that many short documents are slow.
        """
        kind = attn_mask_type or self.attn_mask_type
        _check_call(query, key, value, attention_mask, attention_bias, kind)
        causal = kind in _CAUSAL
        if self.window is not None and not causal:
            raise refuse("windows without a causal mask", "use AttnMaskType.causal")
        if packed_seq_params is None:
            return self._attend(query, key, value, None, causal)
        if packed_seq_params.qkv_format == "sbhd":
            return self._attend(query, key, value, tuple(packed_seq_params.cu_seqlens_q.tolist()), causal)
        if packed_seq_params.qkv_format != "thd":
            raise refuse(f"the packed format {packed_seq_params.qkv_format!r}", 'use "sbhd" or "thd"')
        return self._attend_documents(query, key, value, packed_seq_params, causal)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, borders: tuple[int, ...] | None, causal: bool) -> Tensor:
        layout = SequenceLayout("zigzag", self.group.size, q.shape[0] * self.group.size)
        if layout.local_length != q.shape[0]:
            raise ValueError(f"{q.shape[0]} tokens on each of {self.group.size} ranks: zigzag needs an even number")
        out, _ = sequence_parallel_attention(
            *(x.transpose(0, 1) for x in (q, k, v)),
            layout=layout,
            mask=AttentionMask((borders or (0, layout.length),), causal, self.window),
            group=self.group,
            strategy=self.strategy,
            scale=self.softmax_scale,
            need_lse=False,
        )
        return out.transpose(0, 1).flatten(2)

    def _attend_documents(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams, causal: bool) -> Tensor:
        real = packed.cu_seqlens_q.tolist()
        padded = real if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded.tolist()
        held = [(end - start) // self.group.size for start, end in itertools.pairwise(padded)]
        if sum(held) != q.shape[0]:
            raise ValueError(f"cu_seqlens hold {padded[-1]} tokens, {self.group.size} ranks hold {q.shape[0]} each")
        lengths = [end - start for start, end in itertools.pairwise(real)]
        qs, ks, vs = (x.unsqueeze(1).split(held) for x in (q, k, v))
        outs = [self._attend(q, k, v, (0, n), causal) for q, k, v, n in zip(qs, ks, vs, lengths, strict=True)]
        return torch.cat(outs).squeeze(1)


def _check_config(config: TransformerConfig, attention_type: str, dropout: float) -> None:
    if attention_type != "self":
        raise refuse(f"{attention_type} attention", "only self-attention")
    if dropout:
        raise refuse(f"attention dropout {dropout:g}", "set attention_dropout=0")
    if config.softmax_type != "vanilla":
        raise refuse(f"softmax_type {config.softmax_type!r} (attention sinks)", 'set softmax_type="vanilla"')
    if config.window_size and config.window_size[1] not in (0, -1):
        raise refuse(f"window_size {config.window_size}, which looks ahead", "its second number must be 0")
    for name in ("qk_clip", "log_max_attention_logit", "fp8_dot_product_attention"):
        if getattr(config, name, False):
            raise refuse(name, f"set {name}=False")


def _check_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, kind: AttnMaskType) -> None:
    if kind not in (*_CAUSAL, AttnMaskType.no_mask):
        raise refuse(f"the mask type {kind.name}", "use causal or no_mask, and packed_seq_params for documents")
    if mask is not None:
        raise refuse("attention masks given as a tensor", "pass attention_mask=None; packed_seq_params tells documents")
    if bias is not None:
        raise refuse("attention_bias", "leave it out")
    if q.shape[0] != k.shape[0]:
        raise refuse("key-value caches", "run inference with megatron-core's own attention")
    if q.shape[-1] != v.shape[-1]:
        raise refuse(f"value heads of {v.shape[-1]} with query heads of {q.shape[-1]} (latent attention)", "use equal sizes")
