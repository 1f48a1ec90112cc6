"""RankWatch: what all ranks know of some steps together: loss by position, the slowest rank, exposed communication, memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lctrain.config.schema import TrainConfig
from lctrain.devices import peak_memory_mb
from lctrain.engines.base import Engine
from lctrain.models.watch import Watch
from lctrain.parallel.mesh import ProcessMesh

MOST_RANKS = 64
"""Up to so many, every rank's time is recorded."""
DIGITS = 4


class RankWatch:
    """Watches this rank's models from now on."""

    def __init__(self, config: TrainConfig, mesh: ProcessMesh, engine: Engine, device: torch.device) -> None:
        trainer, groups = config.trainer, engine.groups
        self._mesh, self._engine, self._device = mesh, engine, device
        self._every, self._last = config.tracking.log_every, trainer.steps
        held = (groups.pp, groups.dp, groups.cp, groups.tp, groups.dp_cp, groups.edp, groups.ep, groups.etp)
        self._waits = {group.waits for group in held}
        self._watch = Watch(max([trainer.seq_len, *(stage.seq_len for stage in trainer.stages)]), self._waits, device)
        for model in engine.models():
            model.watch = self._watch
        self._steps, self._steps_s, self._waited_before = 0, 0.0, self._waited()

    def step(self, step: int, step_s: float) -> dict[str, Any]:
        """Metrics of the steps since the last record, or nothing if none is due (every tracking.log_every steps). Collective.

        loss_by_position: mean loss by bucket of position_bucket, None where there was no target. rank_forward_s: each rank's
        own forward time per step. slowest_rank: with the longest, slowest_rank_excess: over the mean, minus 1. exposed_comm:
        share of the steps' time that ranks waited in RankGroups, mean over ranks; on CPU. memory_*_mb: of rank 0, in MiB.
        """
        self._steps, self._steps_s = self._steps + 1, self._steps_s + step_s
        if step % self._every and step != self._last:
            return {}
        buckets, size = self._watch.sums.shape[1], self._mesh.size
        waited = self._waited() - self._waited_before
        everything = torch.zeros(2 * buckets + 1 + size, dtype=torch.float64)
        everything[: 2 * buckets] = self._watch.sums.flatten().cpu()
        everything[2 * buckets] = waited / max(1e-9, self._steps_s) / size
        everything[2 * buckets + 1 + self._mesh.rank] = self._watch.forward_s() / self._steps
        if size > 1:
            dist.all_reduce(everything)
        losses, targets, (exposed, *times) = (part.tolist() for part in everything.split([buckets, buckets, 1 + size]))
        self._forget()
        found: dict[str, Any] = {
            "loss_by_position": [_short(loss / count) if count else None for loss, count in zip(losses, targets, strict=True)],
            **self._memory(),
        }
        if size > 1:
            slowest = max(range(size), key=times.__getitem__)
            found["slowest_rank"] = slowest
            found["slowest_rank_excess"] = _short(times[slowest] * size / max(1e-9, sum(times)) - 1)
            if size <= MOST_RANKS:
                found["rank_forward_s"] = [_short(seconds) for seconds in times]
            if self._device.type == "cpu":
                found["exposed_comm"] = _short(exposed)
        return found

    def _memory(self) -> dict[str, float]:
        held = {kind: size / 2**20 for kind, size in self._engine.memory().items()}
        held["rest"] = max(0.0, peak_memory_mb(self._device) - sum(held.values()))
        return {f"memory_{kind}_mb": round(size, 2) for kind, size in held.items()}

    def _waited(self) -> float:
        return sum(waits.seconds for waits in self._waits)

    def _forget(self) -> None:
        self._watch.forget()
        self._steps, self._steps_s, self._waited_before = 0, 0.0, self._waited()


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
