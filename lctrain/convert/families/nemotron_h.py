"""Nemotron-H: one sublayer per layer, Mamba-2, attention without positions, squared-ReLU MLPs, and in Nemotron 3 experts."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.families.deepseek_v3 import BIAS_RATE
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.function import symbols
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule, same
from lctrain.errors import UserError

_KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_NAMES = {**{kind: symbol for symbol, kind in _KINDS.items()}, "mamba": "M", "attention": "*"}


def _read(keys: Keys, tree: Tree) -> None:
    pattern = keys.optional("hybrid_override_pattern")
    kinds = keys.optional("layers_block_type")
    if kinds is not None:
        for kind in kinds:
            if kind not in _NAMES:
                raise UserError(f"config.json has a layer of type {kind}, which our blocks lack: they have {', '.join(_NAMES)}")
        pattern = "".join(_NAMES[kind] for kind in kinds)
    if pattern is None:
        raise UserError("config.json has neither layers_block_type nor hybrid_override_pattern")
    put(tree, "pattern", pattern)
    put(tree, "mamba.d_inner", keys["mamba_num_heads"] * keys["mamba_head_dim"])
    # transformers takes time_step_min, not time_step_limit, for the smallest step
    put(tree, "mamba.dt_limit_min", float(keys["time_step_min"]))
    if "E" in pattern:
        keys.require("moe_latent_size", None)
        put(tree, "moe.n_experts", keys["n_routed_experts"])
        put(tree, "moe.shared_d_ff", keys["moe_shared_expert_intermediate_size"])
        put(tree, "moe.balance.bias_rate", BIAS_RATE)
        put(tree, "moe.router.score", "sigmoid")


def _write(config: ModelConfig) -> dict[str, Any]:
    pattern = symbols(config.pattern)
    if not set(pattern) <= set(_KINDS):
        raise UserError(f"nemotron_h cannot express model.pattern={config.pattern}: it has {' '.join(_KINDS)}")
    experts = {"n_routed_experts": config.moe.n_experts, "moe_shared_expert_intermediate_size": config.moe.shared_d_ff}
    if "E" in pattern and not config.moe.shared_d_ff:
        raise UserError("nemotron_h cannot express model.moe.shared_d_ff=0: its mixtures have a shared part")
    return {
        "layers_block_type": [_KINDS[symbol] for symbol in pattern],
        "mamba_num_heads": config.mamba.width(config.d_model) // config.mamba.head_dim,
        "time_step_min": config.mamba.dt_limit_min,
        **(experts if "E" in pattern else {}),
    }


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    norm = "norm.weight"
    return {
        "M": [same(norm, norm), *common.mamba("mixer.")],
        "*": common.attention(config, "mixer.", norm),
        "-": common.mlp("mixer.", norm),
        "E": common.mixture("mixer.", norm=norm, shared="shared_experts"),
    }


FAMILY = Family(
    name="nemotron_h",
    architecture="NemotronHForCausalLM",
    fields={
        **common.ATTENTION_FIELDS,
        "norm_eps": "layer_norm_epsilon",
        "attention.head_dim": "head_dim",
        "mlp.d_ff": "intermediate_size",
        "mlp.bias": "mlp_bias",
        "mamba.head_dim": "mamba_head_dim",
        "mamba.d_state": "ssm_state_size",
        "mamba.n_groups": "n_groups",
        "mamba.conv_kernel": "conv_kernel",
        "mamba.conv_bias": "use_conv_bias",
        "mamba.bias": "use_bias",
        "moe.top_k": "num_experts_per_tok",
        "moe.d_ff": "moe_intermediate_size",
        "moe.router.scale": "routed_scaling_factor",
        "moe.router.groups": "n_group",
        "moe.router.top_groups": "topk_group",
        "moe.router.renormalise": "norm_topk_prob",
    },
    settings={"attention.rotary": False, "mlp.activation": "relu2", "moe.activation": "relu2"},
    only={
        **{"attention_dropout": (0.0, None), "hidden_dropout": (0.0, None), "attention_bias": (False, None)},
        **{"mlp_hidden_act": ("relu2",), "mamba_hidden_act": ("silu",), "mamba_proj_bias": (False, None)},
        **{"sliding_window": (None,), "num_nextn_predict_layers": (0, None)},
    },
    assumed={
        **{"tie_word_embeddings": False, "layer_norm_epsilon": 1e-5, "head_dim": 128, "mlp_bias": False, "n_groups": 8},
        **{"conv_kernel": 4, "use_conv_bias": True, "use_bias": False, "time_step_min": 1e-3, "ssm_state_size": 128},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 7688, "routed_scaling_factor": 1.0, "n_group": 1},
        **{"topk_group": 1, "norm_topk_prob": True, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"},
        **{"n_routed_experts": 8, "moe_shared_expert_intermediate_size": 7688, "mamba_head_dim": 64},
    },
    harmless=(
        *("time_step_limit", "time_step_max", "time_step_floor", "chunk_size", "use_mamba_kernels", "mamba_ssm_cache_dtype"),
        *("moe_shared_expert_overlap", "mtp_layers_block_type", "n_shared_experts", "moe_latent_size", "expand"),
        *(
            "n_routed_experts",
            "moe_shared_expert_intermediate_size",
            "num_hidden_layers",
            "rope_theta",
            "max_position_embeddings",
        ),
    ),
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
    dropped=lambda config: {"mtp.": "multi-token prediction, which our blocks lack"},
)
