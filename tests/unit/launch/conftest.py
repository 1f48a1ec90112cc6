"""A config small enough to launch, and ways to look after the processes it starts."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import ModelConfig
from lctrain.config.schema import CorpusConfig, DataConfig, TrainConfig, TrainerConfig
from lctrain.launch.signals import STOP_SIGNALS


@pytest.fixture(autouse=True)
def usual_signal_handlers():
    """Under nohup or in the background of a script, tests start with some signals ignored, which StopRequest respects."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make_config(tmp_path):
    def make(processes: int = 2, grace_s: int = 5, timeout_s: int = 20, **settings) -> TrainConfig:
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        return TrainConfig(
            run_dir=str(run_dir),
            model=ModelConfig(pattern="*-", d_model=16, vocab_size=256),
            data=DataConfig(corpora=(CorpusConfig(prefix="none"),)),
            trainer=TrainerConfig(global_batch=processes),
            launcher=LauncherConfig(processes=processes, threads=1, grace_s=grace_s, timeout_s=timeout_s),
            **settings,
        )

    return make


class Pids:
    """Ranks sign in with their process ids; the test looks whether they still live."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def sign_in(self) -> None:
        (self.folder / str(os.getpid())).touch()

    def wait_for(self, count: int, timeout_s: float = 10) -> list[int]:
        wait_until(lambda: len(list(self.folder.iterdir())) >= count, timeout_s)
        return [int(path.name) for path in self.folder.iterdir()]

    def alive(self) -> list[int]:
        return [int(path.name) for path in self.folder.iterdir() if is_alive(int(path.name))]


@pytest.fixture
def pids(tmp_path):
    signed_in = Pids(tmp_path / "pids")
    yield signed_in
    for pid in signed_in.alive():  # only after a failed test
        os.kill(pid, 9)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(name="wait_until")
def wait_until_fixture():
    return wait_until


@pytest.fixture
def in_background():
    """Run a function in a forked process; its exit status by `wait(pid)`."""
    started = []

    def start(function: Callable[[], int]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                status = function()
            finally:
                os._exit(status)
        started.append(pid)
        return pid

    yield start
    for pid in started:
        if is_alive(pid):
            os.kill(pid, 9)


@pytest.fixture
def exit_status():
    """Status of a process that ends within ten seconds, negative for a signal."""

    def wait(pid: int) -> int:
        deadline = time.monotonic() + 10
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, f"process {pid} does not end"
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(done[1])

    return wait
