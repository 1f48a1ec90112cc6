"""The guard of a run's loss: what counts as a problem, what is done about it, and which batches are left out for good."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from lctrain.checkpoint.agree import from_rank_0
from lctrain.checkpoint.manifest import read_manifest
from lctrain.config.schema import TrainConfig
from lctrain.data.digest import step_digest, step_documents, step_samples
from lctrain.data.samples import SampleSource
from lctrain.engines.base import StepResult
from lctrain.errors import UserError
from lctrain.faults.passed_over import MOST_DOCUMENTS, PassedOver, merged, read_passed_over, to_json, write_passed_over
from lctrain.run_dir import RunDir
from lctrain.tracking.tracker import Tracker

BEFORE_JUDGING = 10
"""Losses to have seen before one can be called a spike."""


class GoBack(Exception):
    """The run goes back to the checkpoint `path`; every rank raises it at the same step."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


class LossGuard:
    """Applies trainer.non_finite and trainer.spike. Its state is equal on all ranks, since losses are.

    Collective to make: rank 0 reads `<run_dir>/passed_over.json` and the meta of the checkpoint that the run continues from.
    """

    def __init__(self, config: TrainConfig, run: RunDir, rank: int, start: int, checkpoint: Path | None) -> None:
        self._config, self._run, self._rank = config, run, rank
        meta: dict[str, Any] = from_rank_0(lambda: _kept(run, checkpoint))
        self.passed_over = [PassedOver.of_json(entry) for entry in meta["passed_over"]]
        self._losses: deque[float] = deque(meta["losses"], maxlen=config.trainer.spike_window)
        self._good = {start: checkpoint} if checkpoint is not None else {}
        self._skipped_in_a_row = 0

    @property
    def needs_first_checkpoint(self) -> bool:
        """Whether the run must save before its first step, as it could not go back otherwise."""
        return self._config.trainer.non_finite == "rollback" and not self._good

    def meta(self) -> dict[str, Any]:
        """What a checkpoint must keep of this."""
        return {"passed_over": to_json(self.passed_over), "losses": list(self._losses)}

    def saved(self, step: int, path: Path) -> None:
        """There is a checkpoint to go back to."""
        self._good[step] = path

    def leaves_out(self, step: int) -> PassedOver | None:
        """Why step `step` (counted from 1) is not to be trained on, if so."""
        return next((entry for entry in self.passed_over if entry.step == step), None)

    def judge(self, result: StepResult) -> str | None:
        """A finite loss that is a spike, in words; else it is remembered as a normal one."""
        factor = self._config.trainer.spike
        if result.problem is not None or not math.isfinite(result.loss):
            return None
        if factor is not None and len(self._losses) >= min(BEFORE_JUDGING, self._config.trainer.spike_window):
            median = statistics.median(self._losses)
            if result.loss > factor * median:
                recent = f"the median {median:g} of the last {len(self._losses)} steps"
                return f"loss {result.loss:g} is above {factor:g} times {recent}"
        self._losses.append(result.loss)
        return None

    def handle(self, step: int, problem: str | None, source: SampleSource, record: dict[str, Any], tracker: Tracker) -> None:
        """Return to go on (with `skipped` in the record if there was a problem), or raise GoBack, or UserError to stop."""
        if problem is None:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        record["skipped"] = True
        trainer = self._config.trainer
        batch = self._describe(source, step, problem, -1)
        facts = {"digest": batch.digest, "samples": batch.samples, "documents": batch.documents} if self._rank == 0 else {}
        tracker.event(
            "not_finite" if not math.isfinite(record["loss"] + record["grad_norm"]) else "spike",
            step=step,
            problem=problem,
            **facts,
        )
        if trainer.non_finite == "skip" and self._skipped_in_a_row <= trainer.max_skips:
            tracker.message(f"step {step}: {problem}; the update is skipped")
            return
        tracker.step(record)
        after = ""
        if trainer.non_finite == "rollback":
            rollbacks = len({entry.found_at for entry in self.passed_over})
            if rollbacks < trainer.max_rollbacks:
                self._go_back(step, problem, source, tracker)
            after = f" after {rollbacks} rollbacks (trainer.max_rollbacks)"
        elif self._skipped_in_a_row > 1:
            after = f" after {self._skipped_in_a_row - 1} skipped steps in a row (trainer.max_skips)"
        raise UserError(f"step {step}: {problem}; stopped{after}, checkpoints stay as they were")

    def _go_back(self, step: int, problem: str, source: SampleSource, tracker: Tracker) -> None:
        """Put the batches on the list, durably, and raise GoBack."""
        good = {at: path for at, path in self._good.items() if path.exists()} if self._rank == 0 else {}
        good = from_rank_0(lambda: good)
        first = step - self._config.trainer.rollback_batches + 1
        early = [at for at in good if at < first] or [at for at in good if at < step]
        if not early:
            raise UserError(f"step {step}: {problem}; stopped, as there is no checkpoint left to go back to")
        target = max(early)
        steps = [at for at in range(max(first, target + 1), step + 1) if self.leaves_out(at) is None]
        entries = [dataclasses.replace(self._describe(source, at, problem, target), found_at=step) for at in steps]
        from_rank_0(lambda: write_passed_over(self._run.passed_over, merged(self.passed_over, entries)))
        tracker.event("rollback", step=step, returned_to=target, problem=problem, passed_over=to_json(entries))
        named = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        tracker.message(f"step {step}: {problem}; going back to step {target}, the batch of {named} is left out from now on")
        raise GoBack(good[target])

    def _describe(self, source: SampleSource, step: int, problem: str, returned_to: int) -> PassedOver:
        batch = self._config.trainer.global_batch
        samples = step_samples(step, batch)
        documents: list[tuple[int, int]] = []
        digest = ""
        if self._rank == 0:  # a pure function of the step: nobody needs to be asked
            documents, digest = step_documents(source, step, batch)[:MOST_DOCUMENTS], step_digest(source, step, batch)
        return PassedOver(step, digest, (samples[0], samples[-1]), tuple(documents), problem, returned_to, step)


def _kept(run: RunDir, checkpoint: Path | None) -> dict[str, Any]:
    meta = read_manifest(checkpoint)["meta"] if checkpoint is not None else {}
    listed = [PassedOver.of_json(entry) for entry in meta.get("passed_over", [])]
    return {"passed_over": to_json(merged(read_passed_over(run.passed_over), listed)), "losses": meta.get("losses", [])}
