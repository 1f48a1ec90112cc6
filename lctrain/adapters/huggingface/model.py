"""Make a transformers model use sequence-parallel attention, after checking that nothing else in it mixes tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from lctrain.adapters.huggingface.attention import attention, no_mask
from lctrain.adapters.unsupported import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")

NAME = "lctrain_sequence_parallel"
"""Name of the attention implementation; `attn_implementation=NAME` works once `register` has run."""


def register() -> None:
    """Make NAME known to transformers; again and again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, no_mask)


def use_sequence_parallel_attention(model: Model) -> Model:
    """Route all attention of a causal language model through lctrain; returns the same model.

    The weights and their names do not change: `save_pretrained` writes the same checkpoint as before, and
    `model.set_attn_implementation("sdpa")` undoes it.

    Raises:
        UnsupportedError: the model mixes tokens outside attention, or in a way that cannot be split; the message names it.
    """
    register()
    _check_modules(model)
    configs = _configs(model)
    for config in configs:
        _check_config(config)
    model.set_attn_implementation(NAME)
    for config in configs:
        if config._attn_implementation != NAME:
            raise refuse(f"{type(config).__name__}'s attention", "the model does not use transformers' attention interface")
    return model


def _configs(model: nn.Module) -> list[Any]:
    from transformers import PreTrainedModel

    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())


def _check_modules(model: nn.Module) -> None:
    loss = getattr(model, "loss_type", None)
    if loss not in (None, "ForCausalLM"):
        raise refuse(f"the loss {loss}", "only causal language models; their loss is summed over tokens")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):  # all state-space and linear-attention layers of transformers have one
            raise refuse(f"convolutions and recurrences over the sequence ({name})", "only attention may mix tokens")
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in ("dynamic", "longrope"):
                raise refuse(
                    f"{kind} rotary scaling ({name})",
                    "it depends on the longest position that a rank holds; use yarn or llama3",
                )


def _check_config(config: Any) -> None:
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        raise refuse(f"layers of type {', '.join(sorted(odd))}", "only full_attention and sliding_attention")
    if getattr(config, "output_router_logits", False):
        raise refuse("the router's auxiliary loss", "transformers takes it per rank; set output_router_logits=False")
    if getattr(config, "output_attentions", False):
        raise refuse("output_attentions", "attention weights of a split sequence are never in one place")
