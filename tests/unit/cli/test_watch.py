"""`lctrain status`, `logs` and `stop` for runs on this machine; tests/slurm has those of jobs."""

import os
import re
import signal
import time

import pytest

from lctrain.commands import logs, status, stop
from lctrain.config.model import ModelConfig
from lctrain.config.render import to_yaml
from lctrain.config.schema import CorpusConfig, DataConfig, TrainConfig, TrainerConfig
from lctrain.errors import UserError
from lctrain.launch.run_state import _duration
from lctrain.launch.signals import StopRequest
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import MetricsLog, append_event


@pytest.fixture
def run(tmp_path):
    """A run directory after 30 of 100 steps, whose process died."""
    run = RunDir(tmp_path / "a=b, c")
    run.path.mkdir()
    config = TrainConfig(
        run_dir=str(run.path),
        model=ModelConfig(name="small", pattern="*-", d_model=16, vocab_size=256),
        data=DataConfig(corpora=(CorpusConfig(prefix="none"),)),
        trainer=TrainerConfig(steps=100),
    )
    run.config.write_text(to_yaml(config))
    metrics = MetricsLog(run.metrics, 0)
    for step in range(1, 31):
        metrics.step({"step": step, "loss": 4.0 - step / 100, "tokens_per_s": 12345.6, "step_s": 60.0})
    metrics.close()
    (run.checkpoints / "step-00000020").mkdir(parents=True)
    append_event(run.events, "launch")
    append_event(run.events, "failure", rank=1, message="rank 1 (pid 7) was killed by SIGKILL")
    return run


@pytest.fixture
def training(run):
    """A process that holds the run directory until it is told to stop; its pid."""
    pid = os.fork()
    if pid == 0:
        with StopRequest() as request, run.prepare():
            while request.requested is None:
                time.sleep(0.01)
        os._exit(0)
    deadline = time.monotonic() + 20
    while not run.lock.exists() or not run.lock.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_status_of_a_run_that_died(run, capsys):
    assert status.main([str(run.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"run        {run.path}: small, 1 process",
        "state      not running",
        "progress   step 30 of 100 (30%), loss 3.7000, 12,346 tok/s",
    ]
    assert re.fullmatch(r"checkpoint step 20, \d+ s ago", lines[3])
    assert lines[4] == "starts     1"
    assert re.fullmatch(r"failure    \d+ s ago: rank 1 \(pid 7\) was killed by SIGKILL", lines[5])


def test_status_and_stop_of_a_living_run(run, training, capsys):
    status.main([f"run={run.path}"])
    text = capsys.readouterr().out
    assert f"state      running, pid {training} on {os.uname().nodename}\n" in text
    assert ", about 70 min left\n" in text
    assert stop.main([str(run.path)]) == 0
    assert capsys.readouterr().out == f"{run.path}: pid {training} has ended\n"
    stop.main([str(run.path)])
    assert capsys.readouterr().out == f"{run.path} is not running\n"


def test_a_run_on_another_machine_is_not_stopped_from_here(run, training):
    run.lock.write_text("1 on elsewhere\n")
    with pytest.raises(UserError, match="is trained by pid 1 on elsewhere: give the command on that machine"):
        stop.main([str(run.path)])


def test_logs(run, capsys):
    logs.main([str(run.path), "lines=1"])
    assert "killed by SIGKILL" in capsys.readouterr().out
    run.log.mkdir()
    run.rank_log(1).write_text("".join(f"line {number}\n" for number in range(5)))
    logs.main([str(run.path), "rank=1", "lines=2"])
    assert capsys.readouterr().out == "line 3\nline 4\n"
    logs.main([str(run.path), "rank=1", "lines=1", "follow=true"])  # returns, as nothing runs any more
    assert capsys.readouterr().out == "line 4\n"
    with pytest.raises(UserError, match=r"rank=7 has no log; .* has rank1\.log"):
        logs.main([str(run.path), "rank=7"])


@pytest.mark.parametrize("command", [status, logs, stop])
def test_what_is_no_run_is_refused(command, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is no run directory of lctrain train"):
            command.main([str(path)])
    with pytest.raises(UserError, match="run has no value"):
        command.main([])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (7199, "120 min"), (7200, "2.0 h"), (172800, "2.0 days")]
)
def test_durations(seconds, text):
    assert _duration(seconds) == text
