"""Qwen3-MoE: Qwen3's attention; experts in most layers, an MLP in the others."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule
from lctrain.errors import UserError


def _read(keys: Keys, tree: Tree) -> None:
    window = keys.optional("sliding_window") if keys.optional("use_sliding_window") else None
    count, step, dense = keys["num_hidden_layers"], keys["decoder_sparse_step"], keys.optional("mlp_only_layers") or []
    channels = ["-" if place in dense or (place + 1) % step else "E" for place in range(count)]
    put(tree, "pattern", common.layers(keys, "*" if window is None else "W", channels))
    put(tree, "attention.window", window)
    found = {keys.optional(key) for key in ("num_experts", "num_local_experts")} - {None}
    if len(found) != 1:
        raise UserError(f"config.json must have num_experts, once: it has {sorted(found) or 'none'}")
    put(tree, "moe.n_experts", found.pop())
    common.read_head_dim(keys, tree)
    common.read_rope(keys, tree)


def _write(config: ModelConfig) -> dict[str, Any]:
    split = common.pairs(config, "qwen3_moe", "*W", "-E")
    keys = common.one_window(config, "qwen3_moe", "-E")
    return {
        **keys,
        "use_sliding_window": keys["sliding_window"] is not None,
        "num_experts": config.moe.n_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [place for place, (_, channel) in enumerate(split) if channel == "-"],
        "head_dim": common.head_dim(config),
        **common.rope(config.attention.rope),
    }


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    attention = common.attention(config)
    return {"*": attention, "W": attention, "-": common.mlp(), "E": common.mixture()}


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields={
        **common.FIELDS,
        "attention.bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "moe.d_ff": "moe_intermediate_size",
        "moe.top_k": "num_experts_per_tok",
        "moe.router.renormalise": "norm_topk_prob",
    },
    settings={"attention.qk_norm": True},
    only=common.NO_DROPOUT,
    assumed={
        **common.ASSUMED,
        **{"rms_norm_eps": 1e-6, "attention_bias": False, "decoder_sparse_step": 1, "norm_topk_prob": False},
        **{"num_experts_per_tok": 8, "sliding_window": 4096},
    },
    harmless=("max_window_layers",),
    read=_read,
    write=_write,
    whole=common.WHOLE,
    layers=_layers,
)
