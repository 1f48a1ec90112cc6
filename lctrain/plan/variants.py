"""Configs that differ from the user's in a few settings."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError


def variant(config: TrainConfig, **settings: Any) -> TrainConfig:
    """The config with other settings, named section__name=value, on as many processes as its grid then has.

    UserError: what the config's checks say of it.
    """
    tree = config.model_dump()
    tree["launcher"] = {}  # who starts the processes does not matter to a plan
    tree["parallel"]["dp"] = config.grid["dp"]
    for name, value in settings.items():
        section, _, key = name.partition("__")
        tree[section][key] = value
    try:
        return TrainConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from None
