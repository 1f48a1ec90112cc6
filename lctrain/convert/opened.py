"""Opened: an input of any format, seen as a model of ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lctrain.config.model import ModelConfig
from lctrain.convert.mapping import WeightMap
from lctrain.convert.stream import Source
from lctrain.errors import UserError


class UnknownModel(UserError):
    """Weights that do not say what model they are of."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """config: of ours, with a padded vocabulary if that was asked for. ours: its tensors. vocabulary: rows before padding.

    mapping: from theirs; None where the input is ours. unmatched: names of theirs that no rule knows. dropped: those that our
    model has no use for, and why. listed: settings of theirs that ask for nothing and that the table does not know.
    carried: folder of files that go along. family: whose names the input has, or once had.
    """

    config: ModelConfig
    ours: Source
    vocabulary: int
    mapping: WeightMap | None = None
    unmatched: list[str] = dataclasses.field(default_factory=list)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    listed: list[str] = dataclasses.field(default_factory=list)
    carried: Path | None = None
    family: str | None = None


def padded(config: ModelConfig, multiple: int) -> ModelConfig:
    """The config with its vocabulary rounded up."""
    return config.model_copy(update={"vocab_size": -(-config.vocab_size // multiple) * multiple})
