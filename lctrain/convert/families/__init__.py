"""Families of Hugging Face models, one table each."""

from __future__ import annotations

import difflib

from lctrain.config.model import ModelConfig
from lctrain.convert.families import bamba, deepseek_v3, jamba, llama, mamba2, mistral, mixtral, nemotron_h, qwen, qwen3_moe
from lctrain.convert.family import Family
from lctrain.errors import UserError

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        llama.FAMILY,
        qwen.QWEN2,
        qwen.QWEN3,
        mistral.FAMILY,
        mixtral.FAMILY,
        qwen3_moe.FAMILY,
        deepseek_v3.FAMILY,
        mamba2.FAMILY,
        bamba.FAMILY,
        nemotron_h.FAMILY,
        jamba.FAMILY,
    )
}
"""By `model_type`."""


def family_named(name: str) -> Family:
    """UserError with the names that exist if there is none of this one."""
    if name in FAMILIES:
        return FAMILIES[name]
    close = difflib.get_close_matches(name, FAMILIES, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"no table for model_type={name}: {hint}there are {', '.join(FAMILIES)} (docs/convert.md: how to add one)")


def family_for(config: ModelConfig) -> Family:
    """The first family that can express a config of ours; UserError with what each of them lacks."""
    reasons = []
    for family in FAMILIES.values():
        try:
            family.hf_config(config)
            return family
        except UserError as error:
            reasons.append(str(error).splitlines()[0])
    raise UserError("no family of Hugging Face models can express this model:\n" + "\n".join(reasons))
