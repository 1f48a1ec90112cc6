"""Runs of the real command line in processes of their own, ways to disturb them, and one undisturbed run to compare with."""

import contextlib
import json
import os
import random
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

from lctrain.data.prepare import prepare
from lctrain.tracking.jsonl import read_events

ROOT = Path(__file__).parents[2]
DEADLINE_S = 90
STEPS, EVERY = 12, 4
SETTINGS = (
    "data=custom",
    "model.d_model=32",
    "model.pattern=(*-){2}",
    "model.vocab_size=257",
    "model.attention.n_heads=2",
    "model.attention.n_kv_heads=1",
    "model.mlp.d_ff=32",
    "data.valid_fraction=0.1",
    f"trainer.steps={STEPS}",
    "trainer.seq_len=203",
    "trainer.stages=[{steps:3,seq_len:101}]",
    "trainer.global_batch=4",
    "trainer.micro_batch=2",
    "trainer.eval_every=5",
    "trainer.eval_batches=1",
    "optim.schedule.warmup_steps=2",
    f"checkpoint.every={EVERY}",
    "checkpoint.keep_last=3",
    "parallel.cp=2",
    "launcher.processes=2",
    "launcher.threads=1",
    "engine.device=cpu",
    "tracking.plot=false",
)
COMPARED = ("step", "loss", "grad_norm", "lr", "eval_loss", "digest", "tokens", "targets", "consumed")


class Training:
    """`lctrain train` on one run directory: start it, disturb it, start it again."""

    def __init__(self, folder: Path, corpus: str, *settings: str) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = [*SETTINGS, f"data.corpora.0.prefix={corpus}", f"run_dir={self.run_dir}", *settings]
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

    def start_to_hold(self, target: str, call: int, *more: str) -> None:
        """Like start_held, but returns at once."""
        hold = self.folder / f"hold{self._starts + 1}"
        hold.mkdir()
        self.start(*more, program=(str(Path(__file__).with_name("held.py")), target, str(call), str(hold)))

    def held(self, processes: int) -> list[int]:
        """Wait until that many processes of the latest start are held; their pids."""
        hold = self.folder / f"hold{self._starts}"
        self.wait_until(lambda: len(list(hold.glob("held-*"))) >= processes)
        return sorted(int(path.name.removeprefix("held-")) for path in hold.glob("held-*"))

    def go_on(self, start: int | None = None) -> None:
        """Let the held processes continue, those of the latest start if no other is named (1, 2, ...)."""
        (self.folder / f"hold{start or self._starts}" / "go").touch()

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

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl as they stand there, without what depends on the clock."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [{key: record[key] for key in COMPARED if key in record} for record in map(json.loads, lines)]

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_events(self.run_dir / "events.jsonl") if event["kind"] == kind]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").iterdir())

    def checkpoint(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"step-{step:08d}"

    def clean_up(self) -> None:
        for pid in self.processes():  # only after a failed test
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """60 documents of made-up words, from 20 to about 3,000 bytes."""
    folder, random_ = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = ["".join(random_.choices("etaoinshrdlu", k=random_.randint(2, 8))) for _ in range(200)]
    for number in range(60):
        text = " ".join(random_.choices(words, k=int(4 * 150 ** random_.random())))
        (folder / f"{number:02}.txt").write_text(text)
    prepare([str(folder)], f"{folder}/corpus", workers=1)
    return f"{folder}/corpus"


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
