"""What can be done with each family, told from its table."""

from __future__ import annotations

from lctrain.config.decode import decode
from lctrain.config.model import ModelConfig
from lctrain.convert import megatron_names
from lctrain.convert.family import Family, Tree, put
from lctrain.errors import UserError
from lctrain.models.pattern import SYMBOLS


def blocks_of(family: Family) -> str:
    """Symbols of the blocks that a family's layers can be, token mixers first."""
    return "".join(symbol for symbol in SYMBOLS if symbol in family.layers(_example(family, "*")))


def megatron_support(family: Family) -> str:
    """The class of megatron-core that holds the family, or what that lacks."""
    blocks = blocks_of(family)
    pattern = blocks if family.per_layer == 1 else "".join(a + b for a in blocks for b in blocks if a in "*W+ML" and b in "-E")
    try:
        config = _example(family, pattern)
        megatron_names.rules(config)
        return str(megatron_names.settings(config)["class"])
    except UserError as error:
        return f"no ({str(error).rpartition('model.')[2]})"


def _example(family: Family, pattern: str) -> ModelConfig:
    """A small model with the family's settings, and what its config.json is taken to say where it is silent."""
    tree: Tree = {}
    for setting, value in {"d_model": 256, "vocab_size": 64, "attention.window": 8, **family.settings}.items():
        put(tree, setting, value)
    for setting, key in family.fields.items():
        if key in family.assumed and not setting.startswith(("moe.", "mamba.head_dim", "attention.head_dim")):
            put(tree, setting, family.assumed[key])
    fraction = family.assumed.get("partial_rotary_factor")
    if fraction is not None:
        put(tree, "attention.rope.fraction", fraction)
    if "time_step_min" in family.assumed:
        put(tree, "mamba.dt_limit_min", family.assumed["time_step_min"])
    return decode(ModelConfig, {"pattern": pattern, **tree})
