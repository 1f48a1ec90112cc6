"""Ranks that sleep, are stopped, raise, or find their meeting place taken: the run ends in time and says who and where."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

STUCK = str(Path(__file__).with_name("stuck.py"))
LIMIT_S = 6
IN_TIME_S = 45
"""Limit, diagnosis, and launcher.grace_s for a rank that must be killed, on a machine that has other things to do."""
SETTINGS = ("launcher.watchdog_s=6", "launcher.grace_s=5", "trainer.eval_every=0")
HANG_STATUS = 75
STEP = "lctrain.train:_agree"


def ranks(training, count: int) -> list[int]:
    logs = [(training.run_dir / "log" / f"rank{rank}.log").read_text() for rank in range(count)]
    return [int(log.rpartition("pid ")[2].split()[0]) for log in logs]


def test_a_rank_that_sleeps_in_a_collective(training):
    run = training("launcher.processes=3", "parallel.cp=3", *SETTINGS)
    run.start(program=(STUCK, "sleep", "1", "9"))
    began = time.monotonic()
    status, out, err = run.finish()  # also: no process is left
    assert status == HANG_STATUS, (out, err)
    assert time.monotonic() - began < IN_TIME_S + 30  # the start takes its time
    (line,) = err.splitlines()
    assert line.startswith("no progress for ")
    assert "rank 1 (pid " in line
    assert " is blocked in step " in line
    assert "in sleep_for_ever" in line
    assert "; ranks 0, 2 wait in step " in line
    assert "all_reduce (" in line
    assert "continue with: " in line
    log = (run.run_dir / "log" / "rank1.log").read_text()
    assert "--- watchdog: no progress for" in log
    assert "stuck.py" in log
    assert "gloo:all_reduce" in (run.run_dir / "log" / "rank0.log").read_text()  # torch's flight recorder
    assert run.events("hang")[0]["message"] in line
    assert "step 12/12" in run.complete()


def test_a_rank_that_is_stopped(training):
    run = training(*SETTINGS)
    run.start_held(STEP, 4, processes=2)
    victim = ranks(run, 2)[1]
    os.kill(victim, signal.SIGSTOP)
    run.go_on()
    began = time.monotonic()
    status, _, err = run.finish()
    assert status == HANG_STATUS
    assert time.monotonic() - began < IN_TIME_S
    first = err.splitlines()[0]
    assert f"rank 1 (pid {victim} on {os.uname().nodename}) does not answer: it is stopped, or its machine is" in first
    assert "; rank 0 waits in step 4: step, in all_reduce (" in first


def test_a_rank_that_raises(training):
    run = training(*SETTINGS)
    began = time.monotonic()
    status, _, err = run.run(program=(STUCK, "raise", "1", "9"))
    assert status == 1
    assert time.monotonic() - began < IN_TIME_S + 30
    (line,) = err.splitlines()
    assert line.startswith("rank 1 (pid ")
    assert "failed: ValueError: planted (" in line
    assert "stopping the other process" in line


def test_a_rank_that_never_comes_to_the_meeting(training):
    run = training(*SETTINGS)
    run.start_held("lctrain.launch.meet:init_process_group", 1, processes=2)
    victim = ranks(run, 2)[1]
    os.kill(victim, signal.SIGSTOP)
    run.go_on()
    status, _, err = run.finish()
    assert status == HANG_STATUS
    assert f"rank 1 (pid {victim} on " in err
    assert "meeting the other ranks" in err


@pytest.mark.parametrize("program", ["torchrun", "by hand"])
def test_a_rendezvous_port_that_is_taken(training, program):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = training(*SETTINGS)
        began = time.monotonic()
        if program == "torchrun":
            torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
            status, _, err = run.run(program=(*torchrun, "--master-port", str(port), "-m", "lctrain"))
        else:
            env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            status, _, err = run.run(RANK="0", **env)
            assert err.splitlines() == [
                f"error: rank 0: the rendezvous at 127.0.0.1:{port} is taken by another program: give another --master-port"
                " (MASTER_PORT)"
            ]
            assert status == 2
            status, _, err = run.run(RANK="1", **env)  # it has met something that listens and never answers
            assert f"127.0.0.1:{port}" in err
            assert "rank 1" in err
        assert status != 0
        assert str(port) in err
        assert time.monotonic() - began < IN_TIME_S + 60
    assert not run.run_dir.exists()
