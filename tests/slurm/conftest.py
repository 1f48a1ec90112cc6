"""A real SLURM of two nodes, runs that are submitted to it, and one undisturbed run to compare with.

Skipped, with the reason, where tools/slurm_lab.sh cannot bring SLURM up.
"""

import contextlib
import fcntl
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.disturbed import tiny
from tests.disturbed.holds import Holds
from tests.disturbed.tiny import ROOT, STEPS, Records

TOOL = ROOT / "tools" / "slurm_lab.sh"
UP_S = 60
DEADLINE_S = 240
SETTINGS = (*tiny.SETTINGS, "tracking.wandb.mode=offline")
ON_TWO_NODES = ("launcher=slurm", "launcher.nodes=2", "launcher.processes_per_node=2", "launcher.slurm.time=30")
BROKEN = ("FAILED", "TIMEOUT", "NODE_FAIL")


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


@pytest.fixture
def power(lab):
    """Nodes that can be switched off; all are on again afterwards."""
    if not lab.has_power_switches:
        pytest.skip("nodes can be switched off only where root may make network namespaces")
    yield lab
    for node in "12":
        lab.tool("start", node)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    return tiny.make_corpus(tmp_path_factory.mktemp("corpus"))


class Run(Records):
    """A run directory, and the `lctrain` commands that are given for it."""

    def __init__(self, lab: Lab, folder: Path, corpus: str, *settings: str) -> None:
        self.lab, self.folder, self.run_dir = lab, folder, folder / "run"
        self.settings = [*SETTINGS, f"data.corpora.0.prefix={corpus}", f"run_dir={self.run_dir}", *settings]
        self.holds = Holds(folder)
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

    def complete_here(self) -> None:
        """Run to the end of the training by this machine's own launcher, undisturbed."""
        done = self.command("train", *self.settings, "launcher.processes=4", "tracking.wandb.mode=disabled")
        assert (done.returncode, done.stderr) == (0, "")

    def submit(self, *more: str) -> str:
        """Submit, and return what is printed; `job` is then the number of the (first) job."""
        done = self.command("train", *self.settings, *ON_TWO_NODES, *more)
        assert done.returncode == 0, done.stderr
        self.job = re.findall(r"^submitted jobs? (\d+)", done.stdout)[0]
        return done.stdout

    def submit_hooked(self, *more: str, **environment: str) -> str:
        """Submit a run whose processes obey tests/disturbed/hooks, which reads these variables."""
        setup = " ".join(f"{name}='{value}'" for name, value in {**self.holds.environment, **environment}.items())
        return self.submit(f'launcher.slurm.setup=["export {setup}"]', *more)

    def submit_to_hold(self, target: str, call: int, *more: str) -> str:
        """Submit a run whose ranks are held at the `call`-th call of `target`, until a signal asks them to stop, or go_on."""
        self.hold_next(target, call)
        return self.submit_hooked(*more)

    def hold_next(self, target: str, call: int) -> None:
        """Where the processes of the next start are held."""
        self.holds.order(target, call, until_signal=True)

    def wait_until_held(self, processes: int = 4) -> None:
        """Wait until that many processes have come to the latest hold; those of later starts are not held any more."""
        self.wait_until(lambda: len(self.holds.held()) >= processes)
        self.holds.no_more()

    def state(self) -> str:
        return self.lab.job(self.job)["JobState"]

    def restarts(self) -> int:
        return int(self.lab.job(self.job)["Restarts"])

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = DEADLINE_S, wrong: Sequence[str] = BROKEN) -> None:
        """Wait for it; fails after a while, and when the job comes to a state that is `wrong`."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain; job {self.state()}:\n{self.log()}"
            assert self.state() not in wrong, self.log()
            time.sleep(0.2)

    def wait_for_end(self) -> None:
        self.wait_until(lambda: self.state() in ("COMPLETED", "CANCELLED"))

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run_dir / "log").glob("slurm-*.out")))

    def ranks(self) -> dict[int, int]:
        """Rank -> pid of the processes that train now."""
        found = {}
        for process, command, env in self._processes("lctrain.slurm.rank"):
            if Path(command[0]).name.startswith("python") and "torch.distributed.run" not in command:
                found[int(env.get("RANK", env["SLURM_PROCID"]))] = process.pid
        return found

    def launchers(self) -> list[int]:
        """Pids of what started the ranks that train now: srun, or the torchrun of each node."""
        found = [(process.pid, command) for process, command, _ in self._processes("lctrain.slurm.rank", "lctrain.slurm.node")]
        torchrun = [pid for pid, command in found if "torch.distributed.run" in command]
        # srun has a helper of the same name, which ends with it.
        return sorted(torchrun) or [min(pid for pid, command in found if Path(command[0]).name == "srun")]

    def everything(self) -> list[int]:
        """Pids of all processes of the job, its batch script first."""
        script = f"job{int(self.job):05}/slurm_script"
        scripts = [process.pid for process in psutil.process_iter() if any(script in word for word in _command(process))]
        modules = ("lctrain.slurm.rank", "lctrain.slurm.node")
        return [*scripts, *(process.pid for process, _, _ in self._processes(*modules))]

    def _processes(self, *modules: str) -> Iterator[tuple[psutil.Process, list[str], dict[str, str]]]:
        """Processes of this run whose command names one of the modules, with command and environment."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = _command(process)
                if any(module in command for module in modules) and any(str(self.run_dir) in word for word in command):
                    yield process, command, process.environ()

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


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def new_run(lab, tmp_path, corpus):
    """Makes runs, of which nothing is left over afterwards."""
    made: list[Run] = []

    def make(*settings: str) -> Run:
        made.append(Run(lab, tmp_path / f"run{len(made)}", corpus, *settings))
        return made[-1]

    yield make
    for one in made:
        one.clean_up()


@pytest.fixture
def run(new_run) -> Run:
    return new_run()


@pytest.fixture(scope="session")
def reference(lab, tmp_path_factory, corpus) -> list[dict]:
    """Metrics of the run that nobody disturbed."""
    whole = Run(lab, tmp_path_factory.mktemp("reference"), corpus)
    whole.complete_here()
    assert [record["step"] for record in whole.metrics()] == list(range(1, STEPS + 1))
    return whole.metrics()
