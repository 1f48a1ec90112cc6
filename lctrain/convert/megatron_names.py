"""The table of megatron-core's GPTModel and MambaModel: which of our tensors is which of theirs, and their settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.config.rope import RopeConfig
from lctrain.convert.function import function_of, symbols
from lctrain.convert.rules import GroupedHeads, Joined, Reordered, Rule, joined, partial_rotation, rotated_pairs, same
from lctrain.errors import UserError

ALIASES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
    "norm.weight": "mixer.in_proj.layer_norm_weight",
}
"""Norms by their names as modules of their own, and within the linear that follows, as Transformer Engine has them."""

MODULES = (
    *("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"),
    *("self_attention.linear_q_proj", "self_attention.linear_q_down_proj", "self_attention.linear_q_up_proj"),
    *("self_attention.linear_kv_down_proj", "self_attention.linear_kv_up_proj", "mlp.linear_fc1", "mlp.linear_fc2"),
    *("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2", "mixer.in_proj", "mixer.out_proj"),
    *("input_layernorm", "pre_mlp_layernorm", "norm", "self_attention.q_layernorm", "self_attention.k_layernorm"),
    "self_attention.kv_layernorm",
)
"""Modules of a layer that put a `_extra_state` into checkpoints; norms do with Transformer Engine."""

WHOLE_MODULES = ("output_layer", "decoder.final_layernorm", "decoder.final_norm")
"""The same outside of layers."""


KNOWN = (
    *("pattern", "d_model", "vocab_size", "norm_eps", "tie_embeddings", "mlp.", "latent_attention.", "mamba."),
    *(f"attention.{name}" for name in ("n_heads", "n_kv_heads", "bias", "qk_norm", "rotary", "head_dim", "window", "rope.")),
)
"""Settings that the table has an answer to; another one that is in use is refused."""

IGNORABLE = ("mamba.dt_limit_min", "mamba.dt_limit_max")
"""What a user may know to change little: limits of step sizes that are hardly ever met."""


def is_hybrid(config: ModelConfig) -> bool:
    """Whether it is a MambaModel, one sublayer per layer; else a GPTModel, whose layers are attention and MLP or experts."""
    pattern = symbols(config.pattern)
    mixers, channels = set(pattern[::2]), set(pattern[1::2])
    paired = len(pattern) % 2 == 0 and mixers <= set("*W+") and channels <= set("-E")
    return not paired


def their_layer(config: ModelConfig, place: int) -> int:
    """Which layer of theirs holds a sublayer of ours."""
    return place if is_hybrid(config) else place // 2


def is_uniform(config: ModelConfig) -> bool:
    """Whether all layers of a GPTModel have the same tensors: megatron-core then stores each kind as one stacked tensor."""
    pattern = symbols(config.pattern).replace("W", "*")
    return not is_hybrid(config) and pattern == pattern[:2] * (len(pattern) // 2)


def rules(config: ModelConfig, accept: Sequence[str] = ()) -> list[Rule]:
    """All rules, layers by number whether they are stacked or not.

    UserError for what megatron-core lacks, unless the user accepts that it is left out.
    """
    _check(config, accept)
    hybrid = is_hybrid(config)
    found = [
        same("embedding", "embedding.word_embeddings.weight"),
        same("head.weight", "output_layer.weight"),
        same("norm.weight", f"decoder.{'final_norm' if hybrid else 'final_layernorm'}.weight"),
    ]
    tables = {"*": _attention(config), "W": _attention(config), "+": _latent(config), "-": _mlp(config), "E": _experts(config)}
    tables["M"] = _mamba()
    for place, symbol in enumerate(symbols(config.pattern)):
        prefix = f"decoder.layers.{their_layer(config, place)}."
        found += [rule.at(f"layers.{place}.", prefix, 0) for rule in tables[symbol]]
    return found


def _attention(config: ModelConfig) -> list[Rule]:
    settings = config.attention
    size = settings.head_dim or config.d_model // settings.n_heads
    partial = settings.rotary and settings.rope.fraction < 1
    heads = GroupedHeads(settings.n_kv_heads, partial_rotation(size, int(size * settings.rope.fraction)) if partial else ())
    module = "self_attention."
    return [
        same("norm.weight", "input_layernorm.weight"),
        *(
            Rule(tuple(f"mixer.{name}.{part}" for name in "qkv"), (f"{module}linear_qkv.{part}",), heads)
            for part in ("weight", "bias")
        ),
        *(same(f"mixer.out.{part}", f"{module}linear_proj.{part}") for part in ("weight", "bias")),
        same("mixer.q_norm.weight", f"{module}q_layernorm.weight"),
        same("mixer.k_norm.weight", f"{module}k_layernorm.weight"),
    ]


def _latent(config: ModelConfig) -> list[Rule]:
    latent = config.latent_attention
    module, turned = "self_attention.", latent.qk_rope_head_dim
    q_up = "linear_q_proj" if latent.q_lora_rank is None else "linear_q_up_proj"
    names = {"q_down": "linear_q_down_proj", "kv_up": "linear_kv_up_proj", "out": "linear_proj", "kv_norm": "kv_layernorm"}
    return [
        same("norm.weight", "input_layernorm.weight"),
        *(same(f"mixer.{ours}.weight", f"{module}{theirs}.weight") for ours, theirs in names.items()),
        same("mixer.q_norm.weight", f"{module}q_layernorm.weight"),
        Rule(
            ("mixer.q_up.weight",),
            (f"{module}{q_up}.weight",),
            Reordered(latent.n_heads, rotated_pairs(latent.qk_nope_head_dim, turned)),
        ),
        Rule(
            ("mixer.kv_down.weight",),
            (f"{module}linear_kv_down_proj.weight",),
            Reordered(1, rotated_pairs(latent.kv_lora_rank, turned)),
        ),
    ]


def _mlp(config: ModelConfig) -> list[Rule]:
    inner = ("gate", "up") if config.mlp.activation == "swiglu" else ("up",)
    return [
        same("norm.weight", "pre_mlp_layernorm.weight"),
        *(joined([f"mixer.{name}.{part}" for name in inner], f"mlp.linear_fc1.{part}") for part in ("weight", "bias")),
        *(same(f"mixer.down.{part}", f"mlp.linear_fc2.{part}") for part in ("weight", "bias")),
    ]


def _experts(config: ModelConfig) -> list[Rule]:
    inner = ("gate", "up") if config.moe.activation == "swiglu" else ("up",)
    return [
        same("norm.weight", "pre_mlp_layernorm.weight"),
        same("mixer.router.weight", "mlp.router.weight"),
        same("mixer.balancer.bias", "mlp.router.expert_bias"),
        Rule(tuple(f"mixer.experts.{name}" for name in inner), ("mlp.experts.experts.linear_fc1.weight",), Joined(axis=1)),
        same("mixer.experts.down", "mlp.experts.experts.linear_fc2.weight"),
        joined([f"mixer.shared.{name}.weight" for name in inner], "mlp.shared_experts.linear_fc1.weight"),
        same("mixer.shared.down.weight", "mlp.shared_experts.linear_fc2.weight"),
        same("mixer.shared_gate.weight", "mlp.shared_experts.gate_weight"),
    ]


def _mamba() -> list[Rule]:
    """They are cut by tensor-parallel ranks one by one, so megatron-core, too, stores z, x, B, C and dt apart."""
    return [
        same("norm.weight", "norm.weight"),
        *(same(f"mixer.{name}.weight", f"mixer.in_proj.weight.{name}") for name in ("z", "x", "B", "C", "dt")),
        *(Rule((f"mixer.conv_{name}.weight",), (f"mixer.conv1d.weight.{name}",), Joined(taps=True)) for name in "xBC"),
        *(same(f"mixer.conv_{name}.bias", f"mixer.conv1d.bias.{name}") for name in "xBC"),
        *(same(f"mixer.{name}", f"mixer.{name}") for name in ("A_log", "D", "dt_bias")),
        same("mixer.norm", "mixer.norm.weight"),
        same("mixer.out.weight", "mixer.out_proj.weight"),
    ]


def _check(config: ModelConfig, accept: Sequence[str]) -> None:
    pattern, attention, mamba = symbols(config.pattern), config.attention, config.mamba
    hybrid = is_hybrid(config)
    lacking = {
        "pattern (L)": "L" in pattern,
        "pattern (+ in a hybrid)": hybrid and "+" in pattern,
        "pattern (W in a hybrid)": hybrid and "W" in pattern,
        "attention.sinks": "*" in pattern and attention.sinks,
        "attention.routed_heads": attention.routed_heads is not None,
        "attention.out_bias": set("*W") & set(pattern) and attention.out_bias and not config.mlp.bias,
        "mlp.bias": "-" in pattern and config.mlp.bias and not (attention.out_bias and attention.bias),
        "norm_eps other than 1e-05 (its mixers have that)": "M" in pattern and config.norm_eps != 1e-5,
        "mamba.conv_kernel other than 4": "M" in pattern and mamba.conv_kernel != 4,
        "mamba.bias": "M" in pattern and mamba.bias,
        "mamba.conv_bias=false": "M" in pattern and not mamba.conv_bias,
        "mamba.dt_limit_min": "M" in pattern and mamba.dt_limit_min > 0,
        "mamba.dt_limit_max": "M" in pattern and mamba.dt_limit_max is not None,
        **(_lacking_of_experts(config) if "E" in pattern else {}),
        "moe.activation other than mlp.activation": {"E", "-"} <= set(pattern)
        and config.moe.activation != config.mlp.activation,
    }
    known = (
        *KNOWN,
        *(f"moe.{name}" for name in ("n_experts", "top_k", "d_ff", "activation", "shared_d_ff", "balance.", "router.")),
    )
    for name, value in function_of(config).items():
        if value and not name.startswith((*known, *lacking)):
            lacking[name] = True
    for name, lacks in lacking.items():
        if lacks and not (name in accept and name in IGNORABLE):
            raise UserError(f"megatron-core's {'MambaModel' if hybrid else 'GPTModel'} cannot express model.{name}")


def _lacking_of_experts(config: ModelConfig) -> dict[str, bool]:
    moe, router = config.moe, config.moe.router
    # It scores a group by its best top_k / top_groups experts; with two of them that is the sum of two.
    same_groups = router.group_score == "top_k_over_groups" or (
        router.group_score == "top2_sum" and router.top_groups * 2 == moe.top_k
    )
    return {
        "moe.router.tasks": router.tasks > 1,
        "moe.router.renormalise=false with sigmoid scores": router.score == "sigmoid"
        and not router.renormalise
        and moe.top_k > 1,
        "moe.router.group_score": router.groups > 1 and not same_groups,
        "moe.shared_gate": moe.shared_gate,
        "moe.capacity_factor": moe.capacity_factor is not None,
    }


def settings(config: ModelConfig) -> dict[str, Any]:
    """The class to build, its arguments and those of its TransformerConfig, as far as they decide what it computes."""
    pattern = symbols(config.pattern)
    hybrid, latent = is_hybrid(config), "+" in pattern
    attention, moe, mamba = config.attention, config.moe, config.mamba
    activation = config.mlp.activation if "-" in pattern else moe.activation
    transformer: dict[str, Any] = {
        "num_layers": len(pattern) if hybrid else len(pattern) // 2,
        "hidden_size": config.d_model,
        "num_attention_heads": config.latent_attention.n_heads if latent else attention.n_heads,
        "ffn_hidden_size": config.mlp.d_ff,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "gated_linear_unit": activation == "swiglu",
        "activation_func": {"swiglu": "silu", "gelu": "gelu_tanh", "relu2": "squared_relu"}[activation],
        "add_bias_linear": "-" in pattern and config.mlp.bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    if latent:
        names = ("q_lora_rank", "kv_lora_rank", "v_head_dim")
        transformer |= {name: getattr(config.latent_attention, name) for name in names}
        transformer |= {
            "multi_latent_attention": True,
            "qk_layernorm": True,
            "qk_head_dim": config.latent_attention.qk_nope_head_dim,
            "qk_pos_emb_head_dim": config.latent_attention.qk_rope_head_dim,
            **_latent_rope(config.latent_attention.rope),
        }
    elif set("*W") & set(pattern):
        transformer |= {
            "num_query_groups": attention.n_kv_heads,
            "kv_channels": attention.head_dim or config.d_model // attention.n_heads,
            "qk_layernorm": attention.qk_norm,
            "add_qkv_bias": attention.bias,
        }
    if "W" in pattern:
        assert attention.window is not None
        full = [symbol == "*" for symbol in pattern[::2]]
        transformer["window_size"] = (attention.window - 1, 0)
        transformer["window_attn_skip_freq"] = [int(not each) for each in full] if any(full) else None
    if "E" in pattern:
        router = moe.router
        transformer |= {
            "num_moe_experts": moe.n_experts,
            "moe_router_topk": moe.top_k,
            "moe_ffn_hidden_size": moe.d_ff,
            "moe_layer_freq": 1 if hybrid or is_uniform(config) else [int(symbol == "E") for symbol in pattern[1::2]],
            "moe_router_score_function": router.score,
            "moe_router_pre_softmax": router.score == "softmax" and not router.renormalise,
            "moe_router_topk_scaling_factor": router.scale if router.scale != 1.0 else None,
            "moe_router_enable_expert_bias": moe.balance.bias_rate > 0,
            "moe_shared_expert_intermediate_size": moe.shared_d_ff or None,
            "moe_router_num_groups": router.groups if router.groups > 1 else None,
            "moe_router_group_topk": router.top_groups if router.groups > 1 else None,
        }
    if "M" in pattern:
        transformer |= {
            "mamba_state_dim": mamba.d_state,
            "mamba_head_dim": mamba.head_dim,
            "mamba_num_groups": mamba.n_groups,
            "mamba_num_heads": mamba.width(config.d_model) // mamba.head_dim,
        }
    model: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "share_embeddings_and_output_weights": config.tie_embeddings,
        **_positions(config),
    }
    if hybrid:
        model["hybrid_override_pattern"] = pattern
    return {"class": "MambaModel" if hybrid else "GPTModel", "transformer_config": transformer, "model": model}


def _positions(config: ModelConfig) -> dict[str, Any]:
    rope = config.attention.rope
    pattern = symbols(config.pattern)
    if "+" in pattern:
        return {"position_embedding_type": "rope"}
    if not config.attention.rotary or not set("*W") & set(pattern):
        return {"position_embedding_type": "none"}
    found: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": rope.theta}
    if is_hybrid(config) and rope.scaling not in ("none", "linear"):
        raise UserError(f"megatron-core's MambaModel cannot express model.attention.rope.scaling={rope.scaling}")
    if rope.fraction < 1:
        found["rotary_percent"] = rope.fraction
    if rope.scaling == "linear":
        found["seq_len_interpolation_factor"] = rope.factor
    elif rope.scaling == "llama3":
        usual = RopeConfig(scaling="llama3", factor=rope.factor, theta=rope.theta)
        if rope != usual:
            raise UserError("megatron-core's GPTModel has llama3 rope scaling with its usual constants only: 8192, 1.0 and 4.0")
        found |= {"rope_scaling": True, "rope_scaling_factor": rope.factor}
    elif rope.scaling == "yarn":
        raise UserError("megatron-core's GPTModel cannot express model.attention.rope.scaling=yarn; take another rule")
    return found


def _latent_rope(rope: RopeConfig) -> dict[str, Any]:
    if rope.scaling == "none":
        return {"rope_type": "rope", "rotary_base": rope.theta}
    if rope.scaling != "yarn":
        raise UserError(f"megatron-core's GPTModel cannot express model.latent_attention.rope.scaling={rope.scaling}")
    return {
        "rope_type": "yarn",
        "rotary_base": rope.theta,
        "rotary_scaling_factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
    }
