"""What families share: Llama's names, rotary position embedding, sliding windows, Mamba-2's fused tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.config.rope import RopeConfig
from lctrain.convert.family import Tree, put
from lctrain.convert.function import symbols
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Joined, Reordered, Rule, experts, joined, partial_rotation, same, taps
from lctrain.errors import UserError

WHOLE = (
    same("embedding", "model.embed_tokens.weight"),
    same("norm.weight", "model.norm.weight"),
    same("head.weight", "lm_head.weight"),
)

ATTENTION_FIELDS = {
    "d_model": "hidden_size",
    "vocab_size": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
    "attention.n_heads": "num_attention_heads",
    "attention.n_kv_heads": "num_key_value_heads",
}
FIELDS = {**ATTENTION_FIELDS, "norm_eps": "rms_norm_eps", "mlp.d_ff": "intermediate_size"}
ASSUMED = {"tie_word_embeddings": False, "rope_theta": 10_000.0, "max_position_embeddings": 2048}
NO_DROPOUT = {"attention_dropout": (0.0, None), "hidden_act": ("silu",)}


def attention(config: ModelConfig, prefix: str = "self_attn.", norm: str | None = "input_layernorm.weight") -> list[Rule]:
    """Names of Llama's attention, with biases and norms of queries and keys where the config has them."""
    settings = config.attention
    head_dim = settings.head_dim or config.d_model // settings.n_heads
    rules = [same("norm.weight", norm)] if norm else []
    for ours, theirs, heads in (("q", "q_proj", settings.n_heads), ("k", "k_proj", settings.n_kv_heads)):
        for part in ("weight", "bias"):
            rule = same(f"mixer.{ours}.{part}", f"{prefix}{theirs}.{part}")
            if settings.rotary and settings.rope.fraction < 1:
                order = partial_rotation(head_dim, int(head_dim * settings.rope.fraction))
                rule = Rule(rule.ours, rule.theirs, Reordered(heads, order))
            rules.append(rule)
    for ours, theirs in (("v", "v_proj"), ("out", "o_proj")):
        rules += [same(f"mixer.{ours}.{part}", f"{prefix}{theirs}.{part}") for part in ("weight", "bias")]
    return rules + [same(f"mixer.{name}.weight", f"{prefix}{name}.weight") for name in ("q_norm", "k_norm")]


def mlp(prefix: str = "mlp.", norm: str = "post_attention_layernorm.weight", ours: str = "mixer.") -> list[Rule]:
    """Names of Llama's MLP. ours: `mixer.shared.` for the part of a mixture that every token uses; that has no norm."""
    rules = [same("norm.weight", norm)] if norm else []
    for name in ("gate", "up", "down"):
        rules += [same(f"{ours}{name}.{part}", f"{prefix}{name}_proj.{part}") for part in ("weight", "bias")]
    return rules


def mixture(
    prefix: str = "mlp.",
    router: str = "gate",
    norm: str | None = "post_attention_layernorm.weight",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str | None = None,
) -> list[Rule]:
    """A router and experts with matrices of their own; shared: the part that every token uses."""
    rules = [same("norm.weight", norm)] if norm else []
    rules.append(same("mixer.router.weight", f"{prefix}{router}.weight"))
    rules.append(same("mixer.balancer.bias", f"{prefix}{router}.e_score_correction_bias"))
    for ours, theirs in zip(("gate", "up", "down"), names, strict=True):
        rules.append(experts(f"mixer.experts.{ours}", f"{prefix}experts.{{expert}}.{theirs}.weight"))
    if shared:
        rules += mlp(f"{prefix}{shared}.", "", "mixer.shared.")
    return rules


def mamba(prefix: str) -> list[Rule]:
    """Mamba-2 as mamba_ssm has it: one projection of z, x, B, C and dt, one convolution of x, B and C."""
    inner = [f"mixer.{name}" for name in ("z", "x", "B", "C", "dt")]
    convs = [f"mixer.conv_{name}" for name in ("x", "B", "C")]
    return [
        joined([f"{name}.weight" for name in inner], f"{prefix}in_proj.weight"),
        joined([f"{name}.bias" for name in inner], f"{prefix}in_proj.bias"),
        taps([f"{name}.weight" for name in convs], f"{prefix}conv1d.weight"),
        Rule(tuple(f"{name}.bias" for name in convs), (f"{prefix}conv1d.bias",), Joined()),
        *(same(f"mixer.{name}", f"{prefix}{name}") for name in ("A_log", "D", "dt_bias")),
        same("mixer.norm", f"{prefix}norm.weight"),
        *(same(f"mixer.out.{part}", f"{prefix}out_proj.{part}") for part in ("weight", "bias")),
    ]


def read_dt_limit(keys: Keys, tree: Tree) -> None:
    """`time_step_limit`, a pair."""
    low, high = keys.optional("time_step_limit") or (0.0, math.inf)
    put(tree, "mamba.dt_limit_min", float(low))
    put(tree, "mamba.dt_limit_max", None if high == math.inf else float(high))


def dt_limit(config: ModelConfig) -> list[Any]:
    """Back from read_dt_limit."""
    high = config.mamba.dt_limit_max
    return [config.mamba.dt_limit_min, {"__float__": "Infinity"} if high is None else high]


def read_head_dim(keys: Keys, tree: Tree) -> None:
    """`head_dim`, or what it is where config.json is silent."""
    put(tree, "attention.head_dim", keys.optional("head_dim") or keys["hidden_size"] // keys["num_attention_heads"])


def head_dim(config: ModelConfig) -> int:
    """Size of a head of `*` and `W`."""
    return config.attention.head_dim or config.d_model // config.attention.n_heads


_SCALING_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        *("attention_factor", "truncate"),
    ),
}
_OURS = {"original_max_position_embeddings": "original_max_position"}


def read_rope(keys: Keys, tree: Tree, section: str = "attention.rope") -> None:
    """`rope_parameters` of transformers 5, or `rope_theta`, `rope_scaling` and `partial_rotary_factor` of before."""
    old = keys.optional("rope_scaling") or {}
    given = {**old, **(keys.optional("rope_parameters") or {})}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    rope: dict[str, Any] = {"theta": float(given.pop("rope_theta", keys["rope_theta"]))}
    fraction = given.pop("partial_rotary_factor", keys.optional("partial_rotary_factor"))
    if fraction not in (None, 1, 1.0):
        rope["fraction"] = float(fraction)
    if kind not in _SCALING_KEYS:
        raise UserError(f"config.json has rope_type={kind}, which our blocks lack: they have {', '.join(_SCALING_KEYS)}")
    for key in given:
        if key not in _SCALING_KEYS[kind] and given[key] is not None:
            raise UserError(f"config.json has {key}={given[key]} in its {kind} rope settings, which our blocks lack")
    given = {key: value for key, value in given.items() if value is not None}
    if kind != "default":
        rope["scaling"] = kind
    if given.pop("truncate", True) is not True:
        raise UserError("config.json has truncate=false in its rope settings, which our blocks lack")
    if "original_max_position_embeddings" in _SCALING_KEYS[kind]:
        given.setdefault(
            "original_max_position_embeddings",
            keys.optional("original_max_position_embeddings") or keys["max_position_embeddings"],
        )
    if kind == "yarn":
        _read_temperature(given, latent=section.startswith("latent"))
    for key, value in given.items():
        name = _OURS.get(key, key)
        rope[name] = value if name == "original_max_position" else float(value)
    for name, value in rope.items():
        put(tree, f"{section}.{name}", value)


def _read_temperature(given: dict[str, Any], latent: bool) -> None:
    """transformers: t(mscale) / t(mscale_all_dim) if both are given, else t(1), else attention_factor; see RopeConfig."""
    stated = given.pop("attention_factor", None)
    pair = given.get("mscale"), given.get("mscale_all_dim")
    if stated is not None:
        if latent or pair[1]:
            raise UserError(
                f"config.json has attention_factor={stated} beside mscale in its rope settings, which our blocks lack"
            )
        given["mscale"] = (float(stated) - 1) / (0.1 * math.log(given["factor"]))
    elif not all(pair):
        if latent and pair[1]:
            raise UserError(
                f"config.json has mscale_all_dim={pair[1]} without mscale in its rope settings, which our blocks lack"
            )
        given.pop("mscale", None)
        given.pop("mscale_all_dim", None)


def rope(settings: RopeConfig) -> dict[str, Any]:
    """`rope_parameters`, from ours."""
    kind = "default" if settings.scaling == "none" else settings.scaling
    found: dict[str, Any] = {"rope_theta": settings.theta, "rope_type": kind}
    for key in _SCALING_KEYS[kind]:
        if key not in ("attention_factor", "truncate", "mscale", "mscale_all_dim"):
            found[key] = getattr(settings, _OURS.get(key, key))
    if kind == "yarn" and settings.mscale_all_dim:
        found |= {"mscale": settings.mscale, "mscale_all_dim": settings.mscale_all_dim}
    elif kind == "yarn" and settings.mscale != 1.0:
        found["attention_factor"] = 0.1 * settings.mscale * math.log(settings.factor) + 1.0
    if settings.fraction < 1:
        found["partial_rotary_factor"] = settings.fraction
    return {"rope_parameters": found}


def layers(keys: Keys, mixers: str | Sequence[str], channel: str | Sequence[str] = "-") -> str:
    """A pattern of `num_hidden_layers` pairs of sublayers."""
    count = keys["num_hidden_layers"]
    mixers, channel = (list(each) * count if len(each) == 1 else each for each in (mixers, channel))
    return "".join(a + b for a, b in zip(mixers, channel, strict=True))


def pairs(config: ModelConfig, family: str, mixers: str, channels: str) -> list[tuple[str, str]]:
    """The pattern as layers of one token mixer and one channel mixer each; UserError if it has another shape."""
    found = symbols(config.pattern)
    split = list(zip(found[::2], found[1::2], strict=False))
    if len(found) % 2 or any(a not in mixers or b not in channels for a, b in split):
        raise UserError(
            f"{family} cannot express model.pattern={config.pattern}: its layers are pairs of one of {' '.join(mixers)} and one"
            f" of {' '.join(channels)}"
        )
    return split


def one_window(config: ModelConfig, family: str, channels: str = "-") -> dict[str, Any]:
    """For families in which all layers have the same window or none: the keys for it and for the number of layers."""
    kinds = {a for a, _ in pairs(config, family, "*W", channels)}
    if len(kinds) > 1:
        raise UserError(f"{family} cannot express model.pattern={config.pattern}: all its layers have one window, or none has")
    return {
        "num_hidden_layers": len(symbols(config.pattern)) // 2,
        "sliding_window": config.attention.window if kinds == {"W"} else None,
    }
