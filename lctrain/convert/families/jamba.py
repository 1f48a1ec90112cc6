"""Jamba: attention without positions, MLPs and experts. Its recurrent layers are Mamba-1, which our blocks lack: refused."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule, same
from lctrain.errors import UserError


def _read(keys: Keys, tree: Tree) -> None:
    count = keys["num_hidden_layers"]
    kinds = keys.optional("layers_block_type") or [
        "attention" if place % keys["attn_layer_period"] == keys["attn_layer_offset"] else "mamba" for place in range(count)
    ]
    recurrent = sum("attention" not in kind or kind == "linear_attention" for kind in kinds)
    if recurrent:
        raise UserError(
            f"config.json has {recurrent} Mamba-1 layers (attn_layer_period), which our blocks lack: M is Mamba-2, another"
            " recurrence with other weights, so such a Jamba cannot be converted"
        )
    n_experts, period, offset = keys["num_experts"], keys["expert_layer_period"], keys["expert_layer_offset"]
    channels = ["E" if n_experts > 1 and place % period == offset else "-" for place in range(count)]
    put(tree, "pattern", common.layers(keys, "*", channels))
    if n_experts > 1:
        put(tree, "moe.n_experts", n_experts)
        put(tree, "moe.top_k", keys["num_experts_per_tok"])
        put(tree, "moe.d_ff", keys["intermediate_size"])
    common.read_head_dim(keys, tree)


def _write(config: ModelConfig) -> dict[str, Any]:
    split = common.pairs(config, "jamba", "*", "-E")
    places = [place for place, (_, channel) in enumerate(split) if channel == "E"]
    period = len(split) if len(places) == 1 else places[1] - places[0] if places else 1
    return {
        "num_hidden_layers": len(split),
        "attn_layer_period": 1,
        "attn_layer_offset": 0,
        "num_experts": config.moe.n_experts if places else 1,
        "num_experts_per_tok": config.moe.top_k if places else 1,
        "expert_layer_period": period,
        "expert_layer_offset": places[0] if places else 0,
        "intermediate_size": config.moe.d_ff if places else config.mlp.d_ff,
    }


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    norm = "pre_ff_layernorm.weight"
    return {
        "*": common.attention(config),
        "-": common.mlp("feed_forward.", norm),
        "E": common.mixture("feed_forward.", "router", norm),
    }


FAMILY = Family(
    name="jamba",
    architecture="JambaForCausalLM",
    fields=common.FIELDS,
    settings={"attention.rotary": False, "moe.router.renormalise": False},
    only=common.NO_DROPOUT,
    assumed={
        **{"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "attn_layer_period": 8, "attn_layer_offset": 4},
        **{"num_experts": 16, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1},
    },
    harmless=(
        *("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank", "mamba_conv_bias", "mamba_proj_bias"),
        *(
            "use_mamba_kernels",
            "use_mambapy",
            "use_associative_scan",
            "num_experts_per_tok",
            "expert_layer_period",
            "layer_types",
        ),
        *("expert_layer_offset",),
    ),
    lacks="Mamba-1 layers (our M is Mamba-2), so only a Jamba without them converts",
    read=_read,
    write=_write,
    whole=(common.WHOLE[0], same("norm.weight", "model.final_layernorm.weight"), common.WHOLE[2]),
    layers=_layers,
)
