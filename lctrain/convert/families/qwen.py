"""Qwen2 (biases on q, k, v) and Qwen3 (norms of q and k): windows may differ from layer to layer."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule
from lctrain.errors import UserError

_KINDS = {"full_attention": "*", "sliding_attention": "W"}


def _read(keys: Keys, tree: Tree) -> None:
    window = keys.optional("sliding_window") if keys.optional("use_sliding_window") else None
    first = keys.optional("max_window_layers")
    kinds = keys.optional("layer_types")
    if kinds is None:
        kinds = [
            "sliding_attention" if window is not None and place >= (first or 0) else "full_attention"
            for place in range(keys["num_hidden_layers"])
        ]
    for kind in kinds:
        if kind not in _KINDS:
            raise UserError(f"config.json has a layer of type {kind}, which our blocks lack: they have {', '.join(_KINDS)}")
    put(tree, "pattern", common.layers(keys, [_KINDS[kind] for kind in kinds]))
    put(tree, "attention.window", window)
    common.read_head_dim(keys, tree)
    common.read_rope(keys, tree)


def _write(config: ModelConfig) -> dict[str, Any]:
    split = common.pairs(config, "qwen", "*W", "-")
    kinds = {symbol: kind for kind, symbol in _KINDS.items()}
    windowed = any(mixer == "W" for mixer, _ in split)
    return {
        "num_hidden_layers": len(split),
        "head_dim": common.head_dim(config),
        "layer_types": [kinds[mixer] for mixer, _ in split],
        "use_sliding_window": windowed,
        "sliding_window": config.attention.window if windowed else None,
        **common.rope(config.attention.rope),
    }


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    attention = common.attention(config)
    return {"*": attention, "W": attention, "-": common.mlp()}


_ASSUMED = {**common.ASSUMED, "rms_norm_eps": 1e-6, "attention_bias": False, "sliding_window": 4096, "max_window_layers": 28}

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=common.FIELDS,
    settings={"attention.bias": True},
    only=common.NO_DROPOUT,
    harmless=("max_window_layers",),  # where layer_types says it all
    assumed=_ASSUMED,
    read=_read,
    write=_write,
    whole=common.WHOLE,
    layers=_layers,
)

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields={**common.FIELDS, "attention.bias": "attention_bias", "attention.out_bias": "attention_bias"},
    settings={"attention.qk_norm": True},
    only=common.NO_DROPOUT,
    harmless=("max_window_layers",),  # where layer_types says it all
    assumed={**_ASSUMED, "head_dim": 128},
    read=_read,
    write=_write,
    whole=common.WHOLE,
    layers=_layers,
)
