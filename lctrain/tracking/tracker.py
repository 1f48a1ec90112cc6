"""What rank 0 tells the world about the run; the other ranks hold a tracker that says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lctrain.config.schema import TrainConfig
from lctrain.run_dir import RunDir
from lctrain.tracking.console_line import ConsoleLine
from lctrain.tracking.jsonl import MetricsLog, append_event


class Tracker:
    """Hands every step's record to metrics.jsonl, the terminal, wandb and TensorBoard, and every event to events.jsonl.

    Trackers observe: except for a full disk under metrics.jsonl (a UserError), nothing that goes wrong here reaches the
    training loop.
    """

    def __init__(self, run: RunDir, config: TrainConfig, start_step: int) -> None:
        """start_step: finished steps that the run continues from, 0 for a new one."""
        self._run = run
        self._console = ConsoleLine(config.trainer.steps, config.tracking.log_every, start_step)
        self._wandb = None
        if config.tracking.wandb.mode != "disabled":
            from lctrain.tracking.wandb import WandbLog

            self._wandb = WandbLog(run, config, self.message)
        self._tensorboard = None
        if config.tracking.tensorboard:
            from lctrain.tracking.tensorboard import TensorBoardLog

            self._tensorboard = TensorBoardLog(run, start_step, self.message)
        self._metrics = MetricsLog(run.metrics, start_step)
        self._load_every, self._last_step = config.tracking.load_every, config.trainer.steps

    def step(self, record: dict[str, Any]) -> None:
        """Record one finished step.

        Scalars of any name, lists with one value per layer, and tables, which are kept every tracking.load_every steps; `step`
        (finished steps, counted from 1) is required. The console line shows those it knows: loss, grad_norm, lr, tokens_per_s,
        step_s, data_wait_s, mfu, memory_mb, eval_loss, skipped.
        """
        if record["step"] % self._load_every and record["step"] != self._last_step:
            record = {key: value for key, value in record.items() if not _is_table(value)}
        self._metrics.step(record)
        self._console.step(record)
        if self._wandb:
            self._wandb.step(record)
        if self._tensorboard:
            self._tensorboard.step(record)

    def event(self, kind: str, **fields: Any) -> None:
        """Note in events.jsonl that something happened: start, resume, checkpoint, skip, stop, end."""
        try:
            append_event(self._run.events, kind, **fields)
        except OSError as error:
            self.message(f"warning: {self._run.events} cannot be written: {error.strerror}")
        if kind == "checkpoint" and self._wandb:
            self._wandb.checkpoint(fields["step"], Path(fields["checkpoint"]))

    def message(self, text: str) -> None:
        """A line for the person at the terminal."""
        self._console.message(text)

    def close(self, status: int = 0) -> None:
        """Finish all outputs; wandb gets a bounded time to do so."""
        self._console.close()
        self._metrics.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.close(status)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list)


class SilentTracker(Tracker):
    """The tracker of ranks other than 0."""

    def __init__(self) -> None:
        pass

    def step(self, record: dict[str, Any]) -> None:
        pass

    def event(self, kind: str, **fields: Any) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self, status: int = 0) -> None:
        pass


def open_tracker(config: TrainConfig, rank: int, start_step: int) -> Tracker:
    """The tracker of a rank; `start_step` finished steps are kept in the run's files, later ones are forgotten."""
    if rank > 0:
        return SilentTracker()
    run = RunDir(Path(config.run_dir))
    run.path.mkdir(parents=True, exist_ok=True)
    return Tracker(run, config, start_step)
