"""Llama 2 and 3 (LlamaForCausalLM): grouped-query attention and SwiGLU."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule


def _read(keys: Keys, tree: Tree) -> None:
    put(tree, "pattern", common.layers(keys, "*"))
    common.read_head_dim(keys, tree)
    common.read_rope(keys, tree)


def _write(config: ModelConfig) -> dict[str, Any]:
    count = len(common.pairs(config, "llama", "*", "-"))
    return {"num_hidden_layers": count, "head_dim": common.head_dim(config), **common.rope(config.attention.rope)}


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    return {"*": common.attention(config), "-": common.mlp()}


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fields={
        **common.FIELDS,
        "attention.bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "mlp.bias": "mlp_bias",
    },
    only=common.NO_DROPOUT,
    assumed={**common.ASSUMED, "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6},
    read=_read,
    write=_write,
    whole=common.WHOLE,
    layers=_layers,
)
