"""Runs of the real command line in processes of their own, ways to disturb them, and one undisturbed run to compare with."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.disturbed import tiny
from tests.disturbed.holds import Holds
from tests.disturbed.tiny import EVERY, ROOT, STEPS, Records

DEADLINE_S = 90
SETTINGS = (
    *tiny.SETTINGS,
    "trainer.stages=[{steps:3,seq_len:101}]",
    "optim.schedule.warmup_steps=2",
    "checkpoint.keep_last=3",
    "launcher.processes=2",
)


class Training(Records):
    """`lctrain train` on one run directory: start it, disturb it, start it again."""

    def __init__(self, folder: Path, corpus: str, *settings: str) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = [*SETTINGS, f"data.corpora.0.prefix={corpus}", f"run_dir={self.run_dir}", *settings]
        self.holds = Holds(folder)
        self._mark = uuid.uuid4().hex
        self._process: subprocess.Popen | None = None
        self._starts = 0

    def start(self, *more: str, program: tuple[str, ...] = ("-m", "lctrain"), **env: str) -> None:
        """Start the command in a session of its own. `program` stands in for `-m lctrain`."""
        assert self._process is None
        self._starts += 1
        everything = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LCTRAIN_TEST": self._mark, **env}
        files = [self.folder / f"{self._starts}.{stream}" for stream in ("out", "err")]
        with open(files[0], "w") as out, open(files[1], "w") as err:
            self._process = subprocess.Popen(
                [sys.executable, *program, "train", *self.settings, *more],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.folder,
                env=everything,
                start_new_session=True,
            )

    def start_held(self, target: str, call: int, *more: str, processes: int = 1) -> list[int]:
        """Start with `target` held at its `call`-th call; returns once that many processes are there, with their pids."""
        self.start_to_hold(target, call, *more)
        return self.held(processes)

    def start_to_hold(self, target: str, call: int, *more: str, **how) -> None:
        """Like start_held, but returns at once."""
        self.holds.order(target, call)
        hooks = self.holds.environment
        self.start(*more, **how, **{**hooks, "PYTHONPATH": f"{hooks['PYTHONPATH']}:{ROOT}"})

    def held(self, processes: int) -> list[int]:
        """Wait until that many processes have come to the latest hold; their pids."""
        self.wait_until(lambda: len(self.holds.held()) >= processes)
        return self.holds.held()

    def go_on(self, hold: int | None = None) -> None:
        """Let the held processes continue, those of the latest hold if no other is named (1, 2, ...)."""
        self.holds.go_on(hold)

    def kill_launcher(self) -> None:
        """SIGKILL; on return the ranks have been told by the kernel, and may still be at work."""
        assert self._process is not None
        self._process.kill()
        assert self._process.wait(DEADLINE_S) == -signal.SIGKILL
        self._process = None

    @property
    def launcher(self) -> int:
        assert self._process is not None
        return self._process.pid

    def said(self, start: int, stream: str = "err") -> str:
        """What a start (1, 2, ...) has written so far."""
        return (self.folder / f"{start}.{stream}").read_text()

    def finish(self) -> tuple[int, str, str]:
        """(status, stdout, stderr) once the command has ended; fails if any process of it is then still there."""
        assert self._process is not None
        status = self._process.wait(DEADLINE_S)
        self._process = None
        assert self.processes() == [], "processes were left behind"
        return status, self.said(self._starts, "out"), self.said(self._starts)

    def run(self, *more: str, **how) -> tuple[int, str, str]:
        """Start, and wait for the end."""
        self.start(*more, **how)
        return self.finish()

    def complete(self, *more: str) -> str:
        """Run to the end of the training, which must succeed in silence; returns stdout."""
        status, out, err = self.run(*more)
        assert (status, err) == (0, ""), (status, out, err)
        return out

    def processes(self) -> list[int]:
        """Pids of all live processes that came from this training."""
        alive = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("LCTRAIN_TEST") == self._mark:
                    alive.append(process.pid)
        return alive

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain; stderr: {self.said(self._starts)}"
            assert self._process is None or self._process.poll() is None, f"it ended: {self.said(self._starts)}"
            time.sleep(0.01)

    def clean_up(self) -> None:
        for pid in self.processes():  # only after a failed test
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    return tiny.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def training(tmp_path, corpus):
    """Makes trainings; the first start of each is a new run."""
    made: list[Training] = []

    def make(*settings: str) -> Training:
        made.append(Training(tmp_path / f"training{len(made)}", corpus, *settings))
        return made[-1]

    yield make
    for one in made:
        one.clean_up()


@pytest.fixture(scope="session")
def reference(tmp_path_factory, corpus) -> Training:
    """The run that nobody disturbed, with checkpoints after steps 4, 8 and 12."""
    whole = Training(tmp_path_factory.mktemp("reference"), corpus)
    try:
        whole.complete()
    finally:
        whole.clean_up()
    assert [record["step"] for record in whole.metrics()] == list(range(1, STEPS + 1))
    return whole


@pytest.fixture
def copy_of_reference(training, reference):
    """A training whose run directory has what the undisturbed one had after `step`."""

    def make(step: int, *settings: str) -> Training:
        copy = training(*settings)
        shutil.copytree(reference.run_dir, copy.run_dir)
        for later in range(step + EVERY, STEPS + 1, EVERY):
            shutil.rmtree(copy.checkpoint(later))
        return copy

    return make
