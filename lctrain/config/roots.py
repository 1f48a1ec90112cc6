"""Which schema each configs/<root>.yaml decodes to."""

from __future__ import annotations

import importlib

from pydantic import BaseModel

ROOTS = {"train": "lctrain.config.schema:TrainConfig"}


def schema_of(root: str) -> type[BaseModel]:
    """The settings class of a root."""
    module, _, name = ROOTS[root].partition(":")
    return getattr(importlib.import_module(module), name)
