"""Metrics to Weights & Biases, without ever holding up or ending the training."""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError
from lctrain.run_dir import RunDir
from lctrain.tracking.scalars import scalars
from lctrain.whole_file import write_text

WAITING_RECORDS = 10_000
"""Records kept while wandb does not answer; further ones are only in metrics.jsonl."""
START_S = 20
"""What an online run gets to reach the service before it is recorded offline."""
CLOSE_S = 30
"""What wandb gets to send the rest at the end of the run; longer than START_S, or a short run might leave nothing."""
FILES = ("config.yaml", "environment.json", "plan.json", "verify_layout.json", "events.jsonl", "report.html")
"""Files of the run directory that go along when it ends, if they are there."""
COPIES = "run"
"""Folder among the files of the wandb run where they lie."""
PICTURES = ("loss.png", "experts.png")
"""Likewise, shown among the curves."""


def check_wandb(config: TrainConfig) -> None:
    """UserError if the config asks for wandb and the package is missing."""
    mode = config.tracking.wandb.mode
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise UserError(f"tracking.wandb.mode={mode} needs wandb: pip install 'lctrain[wandb]', or set it to disabled")


class WandbLog:
    """One wandb run per run directory, continued under the same id after every restart; its files lie under <run_dir>/wandb.

    A thread of its own does everything, as starting, logging and finishing may each wait for a network. A failure is said once
    and ends the recording; a service that cannot be reached at the start makes the run an offline one.
    """

    def __init__(self, run: RunDir, config: TrainConfig, say: Callable[[str], None]) -> None:
        check_wandb(config)
        self._folder, self._say = run, say
        self._config = config
        self._records: queue.Queue[dict[str, Any] | tuple[int, Path] | None] = queue.Queue(WAITING_RECORDS)
        self._last_step = 0
        self._last_checkpoint: tuple[int, Path] | None = None
        self._status = 0
        self._overflow = False
        self._thread = threading.Thread(target=self._record, name="wandb", daemon=True)
        self._thread.start()

    def step(self, record: dict[str, Any]) -> None:
        """Queue one record; `step` in it is the x axis, so steps that are done again after a crash may come twice."""
        try:
            self._records.put_nowait(record)
        except queue.Full:
            if not self._overflow and self._thread.is_alive():
                self._overflow = True
                self._say(f"wandb does not keep up: {WAITING_RECORDS} records wait; later ones are only in metrics.jsonl")

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is whole: as tracking.wandb.artifacts says, hand it over now, at the end of the run, or never."""
        artifacts = self._config.tracking.wandb.artifacts
        if artifacts == "last":
            self._last_checkpoint = (step, path)
        elif artifacts == "all":
            with contextlib.suppress(queue.Full):
                self._records.put_nowait((step, path))

    def close(self, status: int) -> None:
        """Mark the run finished (0) or failed, and wait at most CLOSE_S for wandb to write and send what it has."""
        self._status = status
        if self._thread.is_alive():
            try:
                self._records.put(None, timeout=CLOSE_S / 2)
            except queue.Full:
                return
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                self._say(
                    f"wandb has not finished after {CLOSE_S} s; send the rest with: wandb sync {self._folder.wandb}/*run-*"
                )

    def _record(self) -> None:
        try:
            run = self._start()
            while (record := self._records.get()) is not None:
                if isinstance(record, tuple):
                    self._upload(run, *record)
                else:
                    self._last_step = record["step"]
                    run.log(scalars(record))
            self._add_files(run)
            if self._last_checkpoint is not None:
                self._upload(run, *self._last_checkpoint)
            run.finish(exit_code=self._status)
            self._end_service()
        except BaseException as error:  # SystemExit included: whatever wandb does, the training goes on
            self._say(f"wandb is off for the rest of the run: {_first_line(error)}")

    def _start(self) -> Any:
        mode = self._config.tracking.wandb.mode
        if mode == "online":
            try:
                return self._init("online")
            except Exception as error:
                self._say(
                    f"wandb cannot be reached ({_first_line(error)}); recording offline,"
                    f" send it later with: wandb sync {self._folder.wandb}/offline-run-*"
                )
                self._end_service()  # or it holds on to the run's id
        return self._init("offline")

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = self._config.tracking.wandb
        run = wandb.init(
            mode=mode,
            id=self._run_id(),
            resume="allow",
            dir=self._folder.path,
            name=self._folder.path.resolve().name,
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            tags=settings.tags,
            config=self._config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", init_timeout=START_S),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _add_files(self, run: Any) -> None:
        """Configuration, verdicts, events and pictures, as far as there are any.

        Copies: wandb would make links, which break where its folder is carried to another machine, and through which it could
        write its own config.yaml over ours.
        """
        for name in FILES:
            if (path := self._folder.path / name).exists():
                place = Path(run.dir) / COPIES
                place.mkdir(exist_ok=True)
                run.save(str(shutil.copy2(path, place)), base_path=run.dir, policy="now")
        shown = {path.stem: path for name in PICTURES if (path := self._folder.path / name).exists()}
        if shown:
            import wandb

            run.log({"step": self._last_step, **{name: wandb.Image(str(path)) for name, path in shown.items()}})

    def _upload(self, run: Any, step: int, path: Path) -> None:
        """A checkpoint as a version of the run's artifact; one that is gone by now, or cannot be read, is said and left out."""
        import wandb

        try:
            artifact = wandb.Artifact(f"checkpoint-{run.id}", "model", metadata={"step": step})
            for file in sorted(path.iterdir()):  # add_dir talks on the terminal
                artifact.add_file(str(file))
            run.log_artifact(artifact, aliases=[f"step-{step}"])
        except (OSError, ValueError) as error:
            self._say(f"the checkpoint of step {step} does not go to wandb: {_first_line(error)}")

    def _end_service(self) -> None:
        import wandb

        # finish() returns before wandb's own process has written everything, and a rank leaves without exit handlers.
        wandb.teardown()

    def _run_id(self) -> str:
        path = self._folder.wandb_id
        if not path.exists():
            write_text(path, secrets.token_hex(4) + "\n")
        return path.read_text().strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
