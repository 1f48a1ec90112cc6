"""Mistral: Llama with one sliding window in all layers, or none."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule


def _read(keys: Keys, tree: Tree) -> None:
    window = keys.optional("sliding_window")
    put(tree, "pattern", common.layers(keys, "*" if window is None else "W"))
    put(tree, "attention.window", window)
    common.read_head_dim(keys, tree)
    common.read_rope(keys, tree)


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **common.one_window(config, "mistral"),
        "head_dim": common.head_dim(config),
        **common.rope(config.attention.rope),
    }


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    attention = common.attention(config)
    return {"*": attention, "W": attention, "-": common.mlp()}


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    fields=common.FIELDS,
    only=common.NO_DROPOUT,
    assumed={**common.ASSUMED, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    read=_read,
    write=_write,
    whole=common.WHOLE,
    layers=_layers,
)
