"""Mamba-2 without attention, as transformers has it (state-spaces/mamba2, Codestral Mamba)."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.function import symbols
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule, same
from lctrain.errors import UserError


def _read(keys: Keys, tree: Tree) -> None:
    put(tree, "pattern", "M" * keys["num_hidden_layers"])
    width = int(keys["expand"] * keys["hidden_size"])
    if keys["num_heads"] * keys["head_dim"] != width:
        raise UserError(
            f"config.json has num_heads={keys['num_heads']} of head_dim={keys['head_dim']}, not expand x hidden_size={width}"
        )
    put(tree, "mamba.d_inner", width)
    common.read_dt_limit(keys, tree)


def _write(config: ModelConfig) -> dict[str, Any]:
    pattern = symbols(config.pattern)
    if set(pattern) != {"M"}:
        raise UserError(f"mamba2 cannot express model.pattern={config.pattern}: all its layers are M")
    width = config.mamba.width(config.d_model)
    return {
        "num_hidden_layers": len(pattern),
        "expand": width // config.d_model if width % config.d_model == 0 else width / config.d_model,
        "num_heads": width // config.mamba.head_dim,
        "time_step_limit": common.dt_limit(config),
    }


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    return {"M": [same("norm.weight", "norm.weight"), *common.mamba("mixer.")]}


FAMILY = Family(
    name="mamba2",
    architecture="Mamba2ForCausalLM",
    fields={
        **{"d_model": "hidden_size", "vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"},
        "norm_eps": "layer_norm_epsilon",
        "mamba.head_dim": "head_dim",
        "mamba.d_state": "state_size",
        "mamba.n_groups": "n_groups",
        "mamba.conv_kernel": "conv_kernel",
        "mamba.conv_bias": "use_conv_bias",
        "mamba.bias": "use_bias",
    },
    only={"hidden_act": ("silu",), "norm_before_gate": (False, None), "rms_norm": (True, None)},
    assumed={
        **{"tie_word_embeddings": False, "layer_norm_epsilon": 1e-5, "head_dim": 64, "state_size": 128, "n_groups": 8},
        **{"conv_kernel": 4, "use_conv_bias": True, "use_bias": False, "expand": 2, "num_heads": 128, "hidden_act": "silu"},
    },
    harmless=("time_step_rank", "time_step_min", "time_step_max", "time_step_floor", "chunk_size"),
    prefix="backbone.layers.{layer}.",
    per_layer=1,
    read=_read,
    write=_write,
    whole=(
        same("embedding", "backbone.embeddings.weight"),
        same("norm.weight", "backbone.norm_f.weight"),
        same("head.weight", "lm_head.weight"),
    ),
    layers=_layers,
)
