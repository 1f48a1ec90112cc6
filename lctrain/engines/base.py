"""What the loop asks of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Protocol

from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.models.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One optimizer step, equal on all ranks.

    loss: mean cross-entropy over all targets of the global batch, in nats. grad_norm: global, before clipping.
    problem: None, or what was not finite, where and in which documents; the weights were not updated then.
    """

    loss: float
    grad_norm: float
    problem: str | None


class Engine(Protocol):
    """Owner of the weights, gradients, optimizer state and their distribution over processes."""

    model: LanguageModel

    def train_step(self, batch: StepBatch, targets: int, lr: float) -> StepResult:
        """Forward, backward and update over one global batch that has `targets` valid labels over all ranks."""
        ...

    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """Mean cross-entropy over all targets of all ranks' micro-batches, in nats; nothing is updated."""
        ...

    def state(self) -> dict[str, Any]:
        """Weights and optimizer state as a nested dict of (possibly sharded) tensors under layout-independent names."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state()` returned, possibly after a checkpoint was read into it."""
        ...
