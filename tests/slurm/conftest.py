"""A real SLURM of two nodes, runs that are submitted to it, and one undisturbed run to compare with.

Skipped, with the reason, where tools/slurm_lab.sh cannot bring SLURM up.
"""

import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lctrain.data.prepare import prepare
from lctrain.tracking.jsonl import read_events

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "slurm_lab.sh"
UP_S = 60
DEADLINE_S = 240
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
    "trainer.global_batch=4",
    "trainer.micro_batch=2",
    "trainer.eval_every=5",
    "trainer.eval_batches=1",
    f"checkpoint.every={EVERY}",
    "parallel.cp=2",
    "launcher.threads=1",
    "engine.device=cpu",
    "tracking.plot=false",
    "tracking.wandb.mode=offline",
)
ON_TWO_NODES = ("launcher=slurm", "launcher.nodes=2", "launcher.processes_per_node=2", "launcher.slurm.time=30")
COMPARED = ("step", "loss", "grad_norm", "lr", "eval_loss", "digest", "tokens", "targets", "consumed")


class Lab:
    """The cluster: its commands, and its nodes' power switches (number 1, 2)."""

    def __init__(self, number: int) -> None:
        self.env = {**os.environ, "LAB": str(number), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.folder = Path(f"/tmp/lctrain-slurm-{number}")
        self.env.pop("LAB_ROOT", None)
        self.env["SLURM_CONF"] = str(self.folder / "slurm.conf")

    def tool(self, *words: str, timeout_s: int = UP_S) -> subprocess.CompletedProcess:
        return subprocess.run([TOOL, *words], env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False)

    def order(self, *command: str) -> str:
        """Output of a SLURM command that must succeed; tried again while the controller is too busy to answer."""
        for attempt in range(5):
            done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=90, check=False)
            if done.returncode == 0:
                return done.stdout
            time.sleep(attempt)
        raise AssertionError((command, done.stderr))

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.order("scontrol", "-o", "show", "job", number)))

    @property
    def has_power_switches(self) -> bool:
        return (self.folder / "mode").read_text().strip() == "netns"


@pytest.fixture(scope="session")
def lab():
    """A lab of our own: the first number that nobody else's tests use."""
    for number in itertools.count(10):
        lock = open(f"/tmp/lctrain-slurm-tests-{number}.lock", "w")  # noqa: SIM115 (held as long as the lab)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        lock.close()
    lab = Lab(number)
    try:
        lab.tool("down")  # of tests that were killed
        try:
            done = lab.tool("up")
        except subprocess.TimeoutExpired:
            pytest.skip(f"SLURM did not come up within {UP_S} s")
        if done.returncode:
            pytest.skip((done.stderr.strip().splitlines() or ["tools/slurm_lab.sh up failed without a word"])[-1])
        yield lab
    finally:
        lab.tool("down")
        lock.close()


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


class Run:
    """A run directory, and the `lctrain` commands that are given for it."""

    def __init__(self, lab: Lab, folder: Path, corpus: str) -> None:
        self.lab, self.folder, self.run_dir = lab, folder, folder / "run"
        self.settings = [*SETTINGS, f"data.corpora.0.prefix={corpus}", f"run_dir={self.run_dir}"]
        self.job = ""

    def command(self, *words: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "lctrain", *words],
            cwd=self.folder,
            env=self.lab.env,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def submit(self, *more: str) -> str:
        """Submit, and return what is printed; `job` is then the number of the (first) job."""
        done = self.command("train", *self.settings, *ON_TWO_NODES, *more)
        assert done.returncode == 0, done.stderr
        self.job = re.findall(r"^submitted jobs? (\d+)", done.stdout)[0]
        return done.stdout

    def submit_with(self, *more: str, **environment: str) -> str:
        """Submit a run whose processes obey tests/slurm/hooks, which reads these variables."""
        hooks = str(Path(__file__).with_name("hooks"))
        variables = {"PYTHONPATH": hooks, "LCTRAIN_HOLD_AT": str(self.folder), **environment}
        setup = " ".join(f"{name}='{value}'" for name, value in variables.items())
        return self.submit(f'launcher.slurm.setup=["export {setup}"]', *more)

    def wait_until_held(self, hold: int = 0, processes: int = 4) -> None:
        """Wait until that many processes have come to the given hold."""
        self.wait_until(lambda: len(list(self.folder.glob(f"held-{hold}-*"))) >= processes)

    def go_on(self, hold: int = 0) -> None:
        (self.folder / f"go-{hold}").touch()

    def state(self) -> str:
        return self.lab.job(self.job)["JobState"]

    def restarts(self) -> int:
        return int(self.lab.job(self.job)["Restarts"])

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain; job {self.state()}:\n{self.log()}"
            assert self.state() not in ("FAILED", "TIMEOUT", "NODE_FAIL"), self.log()
            time.sleep(0.2)

    def wait_for_end(self) -> None:
        self.wait_until(lambda: self.state() in ("COMPLETED", "CANCELLED"))

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run_dir / "log").glob("slurm-*.out")))

    def ranks(self) -> dict[int, int]:
        """Rank -> pid of the processes that train now."""
        found = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command, env = process.cmdline(), process.environ()
                if "lctrain.slurm.rank" in command and any(str(self.run_dir) in word for word in command):
                    found[int(env.get("RANK", env["SLURM_PROCID"]))] = process.pid
        return found

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl as they stand there, without what depends on the clock."""
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [{key: record[key] for key in COMPARED if key in record} for record in map(json.loads, lines)]

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_events(self.run_dir / "events.jsonl") if event["kind"] == kind]

    def wandb_ids(self) -> set[str]:
        return {path.name.rpartition("-")[2] for path in (self.run_dir / "wandb").glob("offline-run-*")}

    def clean_up(self) -> None:
        """Nothing of this test may run on into the next one."""
        if self.job:
            subprocess.run(
                ["scancel", "--user", str(os.getuid())], env=self.lab.env, capture_output=True, timeout=60, check=False
            )
            with contextlib.suppress(AssertionError):
                self.wait_until(lambda: not self.lab.order("squeue", "-h", "-o", "%i").strip(), 60)


@pytest.fixture
def run(lab, tmp_path, corpus):
    one = Run(lab, tmp_path, corpus)
    yield one
    one.clean_up()


@pytest.fixture(scope="session")
def reference(lab, tmp_path_factory, corpus) -> list[dict]:
    """Metrics of the run that nobody disturbed, by this machine's own launcher."""
    whole = Run(lab, tmp_path_factory.mktemp("reference"), corpus)
    done = whole.command("train", *whole.settings, "launcher.processes=4", "tracking.wandb.mode=disabled")
    assert (done.returncode, done.stderr) == (0, "")
    assert [record["step"] for record in whole.metrics()] == list(range(1, STEPS + 1))
    return whole.metrics()
