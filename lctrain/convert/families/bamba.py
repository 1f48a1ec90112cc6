"""Bamba: Mamba-2 with attention in some layers, of which half of every head is rotated, and an MLP in every layer."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule, same
from lctrain.errors import UserError

_NORM = "input_layernorm.weight"


def _read(keys: Keys, tree: Tree) -> None:
    attention = keys.optional("attn_layer_indices") or []
    put(tree, "pattern", common.layers(keys, ["*" if i in attention else "M" for i in range(keys["num_hidden_layers"])]))
    width = int(keys["mamba_expand"] * keys["hidden_size"])
    heads, size = keys["mamba_n_heads"], keys["mamba_d_head"]
    if heads * (width // heads if size == "auto" else size) != width:
        raise UserError(f"config.json has mamba_n_heads={heads} of mamba_d_head={size}, not mamba_expand x hidden_size={width}")
    put(tree, "mamba.d_inner", width)
    put(tree, "mamba.head_dim", width // heads)
    common.read_dt_limit(keys, tree)
    common.read_head_dim(keys, tree)
    common.read_rope(keys, tree)


def _write(config: ModelConfig) -> dict[str, Any]:
    split = common.pairs(config, "bamba", "M*", "-")
    width = config.mamba.width(config.d_model)
    return {
        "num_hidden_layers": len(split),
        "attn_layer_indices": [place for place, (mixer, _) in enumerate(split) if mixer == "*"],
        "mamba_expand": width // config.d_model if width % config.d_model == 0 else width / config.d_model,
        "mamba_n_heads": width // config.mamba.head_dim,
        "mamba_d_head": config.mamba.head_dim,
        "time_step_limit": common.dt_limit(config),
        "head_dim": common.head_dim(config),
        **common.rope(config.attention.rope),
    }


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    return {
        "M": [same("norm.weight", _NORM), *common.mamba("mamba.")],
        "*": common.attention(config, norm=_NORM),
        "-": common.mlp("feed_forward.", "pre_ff_layernorm.weight"),
    }


FAMILY = Family(
    name="bamba",
    architecture="BambaForCausalLM",
    fields={
        **common.FIELDS,
        "attention.bias": "attention_bias",
        "attention.out_bias": "attention_bias",
        "mlp.bias": "mlp_bias",
        "mamba.d_state": "mamba_d_state",
        "mamba.n_groups": "mamba_n_groups",
        "mamba.conv_kernel": "mamba_d_conv",
        "mamba.conv_bias": "mamba_conv_bias",
        "mamba.bias": "mamba_proj_bias",
    },
    only=common.NO_DROPOUT,
    assumed={
        **common.ASSUMED,
        **{"rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False, "mamba_d_state": 256, "mamba_n_groups": 1},
        **{"mamba_d_conv": 4, "mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_expand": 2, "mamba_n_heads": 128},
        **{"mamba_d_head": "auto", "partial_rotary_factor": 0.5},
    },
    harmless=("mamba_chunk_size", "z_loss_coefficient", "attn_rotary_emb"),
    read=_read,
    write=_write,
    whole=(common.WHOLE[0], same("norm.weight", "model.final_layernorm.weight"), common.WHOLE[2]),
    layers=_layers,
)
