"""Mixtral: Mistral's attention, and experts in every layer."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule


def _read(keys: Keys, tree: Tree) -> None:
    window = keys.optional("sliding_window")
    put(tree, "pattern", common.layers(keys, "*" if window is None else "W", "E"))
    put(tree, "attention.window", window)
    common.read_head_dim(keys, tree)
    common.read_rope(keys, tree)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **common.one_window(config, "mixtral", "E"),
        "head_dim": common.head_dim(config),
        **common.rope(config.attention.rope),
    }


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    attention = common.attention(config)
    names = ("w1", "w3", "w2")  # gate, up, down
    return {"*": attention, "W": attention, "E": common.mixture("block_sparse_moe.", names=names)}


FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    fields={
        **common.ATTENTION_FIELDS,
        "norm_eps": "rms_norm_eps",
        "moe.d_ff": "intermediate_size",
        "moe.n_experts": "num_local_experts",
        "moe.top_k": "num_experts_per_tok",
    },
    only={**common.NO_DROPOUT, "router_jitter_noise": (0.0, None)},
    assumed={**common.ASSUMED, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    read=_read,
    write=_write,
    whole=common.WHOLE,
    layers=_layers,
)
