"""What of a model's settings its logits depend on: two configs with the same answer compute the same from the same weights."""

from __future__ import annotations

import math
from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.config.rope import RopeConfig
from lctrain.models.pattern import parse_pattern

TRAINING: dict[str, set[str]] = {
    "mamba": {"dt_min", "dt_max", "a_min", "a_max", "chunk"},
    "linear_attention": {"chunk"},
    "latent_attention": {"travel", "rope"},
    "moe": {"balance", "router"},
    "attention": {"rope", "window", "head_dim"},
    "mlp": set(),
}
"""Settings of each section that only first values, losses or speed depend on, and those that are taken apart below."""

ROPE: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "llama3": ("factor", "original_max_position", "low_freq_factor", "high_freq_factor"),
}


def symbols(pattern: str) -> str:
    """A pattern without repeats and pipeline cuts, one symbol per sublayer."""
    return "".join(layer.symbol for layer in parse_pattern(pattern))


def function_of(config: ModelConfig) -> dict[str, Any]:
    """Dotted setting -> value, of all that matters; sections that the pattern does not use are left out."""
    pattern = symbols(config.pattern)
    found: dict[str, Any] = {"pattern": pattern}
    found |= {name: getattr(config, name) for name in ("d_model", "vocab_size", "norm_eps", "tie_embeddings")}
    sections = {"attention": "*W", "mlp": "-", "latent_attention": "+", "mamba": "M", "linear_attention": "L", "moe": "E"}
    for section, users in sections.items():
        if set(users) & set(pattern):
            values = getattr(config, section).model_dump(exclude=TRAINING[section])
            found |= {f"{section}.{name}": value for name, value in values.items()}
    if set("*W") & set(pattern):
        attention = config.attention
        found["attention.head_dim"] = attention.head_dim or config.d_model // attention.n_heads
        if attention.rotary:
            found |= _rope("attention.rope", attention.rope)
        if "W" in pattern:
            found["attention.window"] = attention.window
    if "+" in pattern:
        found |= _rope("latent_attention.rope", config.latent_attention.rope)
    if "M" in pattern:
        found["mamba.d_inner"] = config.mamba.width(config.d_model)
    if "E" in pattern:
        router = config.moe.router
        grouped = {"top_groups": router.top_groups, "group_score": router.group_score} if router.groups > 1 else {}
        values = {**router.model_dump(include={"score", "renormalise", "scale", "groups", "tasks"}), **grouped}
        found |= {f"moe.router.{name}": value for name, value in values.items()}
        found["moe.balance.bias_rate"] = "above 0" if config.moe.balance.bias_rate else 0.0
    return found


def differences(ours: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted setting -> both values, where they compute something else. Numbers may differ by rounding."""
    left, right = function_of(ours), function_of(theirs)
    names = [*left, *(name for name in right if name not in left)]
    pairs = {name: (left.get(name), right.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if not _equal(*pair)}


def _rope(prefix: str, rope: RopeConfig) -> dict[str, Any]:
    names = ("theta", "scaling", "fraction", *ROPE[rope.scaling])
    return {f"{prefix}.{name}": getattr(rope, name) for name in names}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)
    return bool(a == b)
