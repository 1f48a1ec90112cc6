"""The folder of a run: where everything in it lies, who may write to it, and what is noted when a run starts."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from lctrain.config.render import to_yaml
from lctrain.config.schema import TrainConfig
from lctrain.environment import describe_environment, git_diff
from lctrain.errors import UserError
from lctrain.tracking.jsonl import append_event
from lctrain.whole_file import write_json, write_text


class RunDir:
    """Layout of a run directory, and its lock.

    Used as `with RunDir(path).prepare() as run:`; without `prepare` it only names paths and needs no folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.diff = self.path / "git.diff"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.passed_over = self.path / "passed_over.json"
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / "log"
        self.plot = self.path / "loss.png"
        self.expert_load = self.path / "experts.png"
        self.report = self.path / "report.html"
        self.wandb = self.path / "wandb"
        self.tensorboard = self.path / "tensorboard"
        self.wandb_id = self.path / "wandb.id"
        self.lock = self.path / "lock"
        self.slurm = self.path / "slurm"
        self._lock_fd: int | None = None

    def rank_log(self, rank: int) -> Path:
        """Output and traces of one rank."""
        return self.log / f"rank{rank}.log"

    def prepare(self, patience_s: float = 60.0) -> RunDir:
        """Create the folder, take its lock, and note the environment; for the launcher, before it forks.

        UserError if the folder cannot be written or another run holds it. The ranks of a launcher that was killed hold it
        while they save; that is waited for, up to `patience_s`. Of a holder on another machine we cannot know whether it lives.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire(patience_s)
        except OSError as error:
            raise UserError(f"run_dir={self.path} cannot be used: {error.strerror}; choose another run_dir") from None
        try:
            environment = describe_environment()
            write_json(self.environment, environment)
            if diff := git_diff():
                write_text(self.diff, diff)
            else:
                self.diff.unlink(missing_ok=True)
            noted = {key: environment[key] for key in ("host", "pid", "command", "git_commit")}
            append_event(self.events, "launch", **noted)
        except OSError as error:
            self.release()
            raise self._not_written(error) from None
        return self

    def note_config(self, config: TrainConfig) -> list[str]:
        """Write config.yaml; for rank 0, once the config has been found to fit the run's checkpoints.

        One that differs from the one already there replaces it; the earlier one stays as config.<n>.yaml, and an event lists
        what changed, which is returned too.
        """
        try:
            if changes := self._write_config(config):
                append_event(self.events, "config", changes=changes)
        except OSError as error:
            raise self._not_written(error) from None
        return changes

    def release(self) -> None:
        """Give the lock up; forked ranks that still live keep it."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _acquire(self, patience_s: float) -> None:
        # flock belongs to the open file, which forked ranks share: the folder is free only when the last of them has ended.
        fd = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        began = time.monotonic()
        waiting = False
        try:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                holder = os.pread(fd, 100, 0).decode(errors="replace").strip()
                alive = _is_alive(holder)
                if alive is not False or time.monotonic() >= began + patience_s:
                    raise UserError(f"run_dir={self.path} is in use by pid {holder}; end that run or choose another run_dir")
                if not waiting:
                    waiting = True
                    print(f"the launcher of {self.path} (pid {holder}) is gone; waiting for its ranks to end", file=sys.stderr)
                time.sleep(0.05)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        except BaseException:
            os.close(fd)
            raise
        self._lock_fd = fd

    def _not_written(self, error: OSError) -> UserError:
        return UserError(f"run_dir={self.path} cannot be written: {error.strerror}; free some space or choose another run_dir")

    def _write_config(self, config: TrainConfig) -> list[str]:
        new = to_yaml(config)
        changes = []
        if self.config.exists():
            old = self.config.read_text()
            changes = config_changes(yaml.safe_load(old), yaml.safe_load(new))
            if changes:
                earlier = (self.path / f"config.{n}.yaml" for n in itertools.count(1))
                write_text(next(path for path in earlier if not path.exists()), old)
        write_text(self.config, new)
        return changes


def config_changes(old: Any, new: Any, path: str = "") -> list[str]:
    """`["optim.lr: 0.1 -> 0.2", ...]` for two trees of plain values; lists are compared as a whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line for key in keys for line in config_changes(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def command_line(without: str | None = None) -> str:
    """The command that started this process, ready to be pasted, if wanted without the override of one setting."""
    program = [Path(sys.argv[0]).name] if Path(sys.argv[0]).name == "lctrain" else sys.orig_argv[: -len(sys.argv) + 1 or None]
    arguments = [argument for argument in sys.argv[1:] if without is None or not argument.startswith(f"{without}=")]
    return shlex.join([*program, *arguments])


def lock_holder(run: RunDir) -> str | None:
    """`PID on HOST` of the launcher (or, under torchrun or SLURM, rank 0) that holds a run directory; None if nobody does."""
    try:
        with open(run.lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(100).strip() or "an unknown process"
    except OSError:
        pass
    return None


def _is_alive(holder: str) -> bool | None:
    """Whether the process named in a lock lives; None if it is on another machine."""
    pid, _, host = holder.partition(" on ")
    if host != os.uname().nodename or not pid.isdigit():
        return None if holder else False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
