"""What the loop asks of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.models.model import LanguageModel
from lctrain.parallel.mesh import MeshGroups


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Forward and backward pass over one global batch, equal on all ranks.

    loss: mean cross-entropy over all targets of the global batch, in nats. grad_norm: global, before clipping.
    problem: None, or what was not finite, where and in which documents: the weights must not be updated then.
    extra: further metrics of the step, as metrics.jsonl shows them.
    """

    loss: float
    grad_norm: float
    problem: str | None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


class Engine(Protocol):
    """Owner of the weights, gradients, optimizer state and their distribution over processes."""

    groups: MeshGroups

    def backward(self, batch: StepBatch, targets: int) -> StepResult:
        """Gradients of the mean loss over one global batch that has `targets` valid labels over all ranks."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Those gradients before clipping, whole, fp32 on CPU, by parameter name; on rank 0, {} elsewhere. Collective."""
        ...

    def update(self, lr: float) -> None:
        """Clip the gradients and let the optimizer step."""
        ...

    def discard(self) -> None:
        """Drop the gradients."""
        ...

    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """Mean cross-entropy over all targets of all ranks' micro-batches, in nats; nothing is updated."""
        ...

    def token_losses(self, batches: Iterable[MicroBatch]) -> list[Tensor]:
        """Cross-entropy of each token of this rank's shares, fp32 [B, T], 0 where there is no label; nothing is updated.

        Empty on ranks of pipeline stages that have no loss. Collective.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Weights and optimizer state as a nested dict of (possibly sharded) tensors under layout-independent names.

        Tensors may be the engine's own. Then they change in `update`, `discard` and `load_state`, or by being written to, and
        at no other time: checkpoints in the background are copied until then.
        """
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state()` returned, possibly after a checkpoint was read into it."""
        ...

    def models(self) -> list[LanguageModel]:
        """What this rank computes with: the model, or its pieces of it."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's `weights`, `gradients` (what they take while there are any) and `optimizer` state."""
        ...


def train_step(
    engine: Engine,
    batch: StepBatch,
    targets: int,
    lr: float,
    judge: Callable[[StepResult], str | None] | None = None,
    before_change: Callable[[], None] = lambda: None,
) -> StepResult:
    """One optimizer step; without an update if anything was not finite, or `judge` finds a problem (the same on all ranks).

    before_change: called when all that reads the state alone is done, before anything of it changes.
    """
    result = engine.backward(batch, targets)
    if judge is not None and result.problem is None:
        result = dataclasses.replace(result, problem=judge(result))
    before_change()
    if result.problem is None:
        engine.update(lr)
    else:
        engine.discard()
    return result
