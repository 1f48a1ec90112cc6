"""Launching ranks on this machine: what is said, what is returned, and that no process stays behind."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lctrain.errors import UserError
from lctrain.launch import local, rank, signals
from lctrain.launch.local import launch_local
from lctrain.launch.process import init_process_group
from lctrain.launch.signals import StopRequest
from lctrain.tracking.jsonl import read_events

pytestmark = pytest.mark.timeout(60)


def join(process, rendezvous, timeout_s=20):
    init_process_group(process, rendezvous, "cpu", timeout_s)


def meet():
    dist.all_reduce(torch.ones(1))


def test_every_rank_runs_and_only_rank_0_speaks(make_config, capfd):
    config = make_config(3)

    def entry(config, process, rendezvous):
        join(process, rendezvous)
        total = torch.tensor(float(process.rank))
        dist.all_reduce(total)
        print(f"rank {process.rank} of {process.world_size} saw {total:g} with {torch.get_num_threads()} thread", flush=True)
        return 0

    assert launch_local(entry, config) == 0
    shown = capfd.readouterr()
    assert shown.out == "rank 0 of 3 saw 3 with 1 thread\n"
    assert shown.err == ""
    log = Path(config.run_dir, "log", "rank2.log").read_text()
    assert "rank 2 of 3, pid" in log
    assert "rank 2 of 3 saw 3 with 1 thread" in log


def test_one_process(make_config):
    def entry(config, process, rendezvous):
        join(process, rendezvous)
        meet()
        return 0

    assert launch_local(entry, make_config(1)) == 0


def test_without_a_run_directory_all_ranks_speak(make_config, tmp_path, capfd):
    config = make_config(2).model_copy(update={"run_dir": str(tmp_path / "nowhere")})

    def entry(config, process, rendezvous):
        print(f"rank {process.rank}")
        return 0

    assert launch_local(entry, config) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["rank 0", "rank 1"]
    assert not (tmp_path / "nowhere").exists()


def test_exception_of_one_rank_is_the_only_one_shown(make_config, capfd):
    config = make_config(3)

    def entry(config, process, rendezvous):
        join(process, rendezvous)
        meet()
        if process.rank == 1:
            raise ValueError("the thing is bad\nand more")
        meet()
        return 0

    assert launch_local(entry, config) == 1
    error = capfd.readouterr().err
    log = Path(config.run_dir, "log", "rank1.log")
    assert error.count("\n") == 1
    assert error.startswith("rank 1 (pid ")
    assert "failed: ValueError: the thing is bad (test_local.py:" in error
    assert f"stopping the other 2 processes; trace in {log}" in error
    assert 'raise ValueError("the thing is bad' in log.read_text()
    assert "RuntimeError" in Path(config.run_dir, "log", "rank0.log").read_text()  # what gloo says of the loss of a peer
    (event,) = read_events(Path(config.run_dir, "events.jsonl"))
    assert (event["kind"], event["rank"]) == ("failure", 1)


def test_user_error_of_all_ranks_is_said_once(make_config, capfd):
    def entry(config, process, rendezvous):
        raise UserError("corpus x is empty: prepare it")

    assert launch_local(entry, make_config(3)) == 2
    assert capfd.readouterr().err == "error: corpus x is empty: prepare it\n"


def test_very_long_messages_are_cut_not_mixed(make_config, capfd):
    def entry(config, process, rendezvous):
        raise UserError(chr(ord("a") + process.rank) * 100_000)

    assert launch_local(entry, make_config(4)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert len(set(line.removeprefix("error: "))) == 1


def test_status_of_entry_and_of_sys_exit(make_config, capfd):
    assert launch_local(lambda config, process, rendezvous: 7, make_config(1)) == 7
    assert "rank 0" in capfd.readouterr().err

    def leave(config, process, rendezvous):
        raise SystemExit(3)

    assert launch_local(leave, make_config(1)) == 3


def test_kill_9_of_a_rank(make_config, pids, capfd):
    def entry(config, process, rendezvous):
        pids.sign_in()
        join(process, rendezvous)
        meet()
        if process.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        meet()
        return 0

    begin = time.monotonic()
    assert launch_local(entry, make_config(4)) == 128 + 9
    assert time.monotonic() - begin < 10
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("rank 2 (pid ")
    assert "was killed by SIGKILL; stopping the other 3 processes; continue with: " in line
    assert pids.alive() == []


def test_abort_leaves_a_trace_in_the_log(make_config, capfd):
    config = make_config(1)

    def entry(config, process, rendezvous):
        os.abort()

    assert launch_local(entry, config) == 128 + signal.SIGABRT
    assert "was killed by SIGABRT" in capfd.readouterr().err
    assert "Fatal Python error: Aborted" in Path(config.run_dir, "log", "rank0.log").read_text()


def test_abort_that_answers_an_exception_is_not_called_the_cause(make_config, tmp_path, wait_until, capfd):
    def entry(config, process, rendezvous):
        if process.rank == 1:
            wait_until((tmp_path / "raising").exists)
            os.abort()
        (tmp_path / "raising").touch()
        time.sleep(0.05)
        raise ValueError("the cause")

    assert launch_local(entry, make_config(2)) == 1
    assert "failed: ValueError: the cause" in capfd.readouterr().err


def test_peer_that_does_not_notice_is_killed_after_the_grace_time(make_config, pids, capfd):
    def entry(config, process, rendezvous):
        pids.sign_in()
        if process.rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        pids.wait_for(2)
        time.sleep(0.1)
        raise RuntimeError("gone")

    begin = time.monotonic()
    assert launch_local(entry, make_config(2, grace_s=1)) == 1
    assert time.monotonic() - begin < 8
    first, second = capfd.readouterr().err.splitlines()
    assert "rank 1" in first
    assert second.startswith("rank 0 (pid ")
    assert "did not end within 1 s: killed" in second
    assert pids.alive() == []


def train_until_stopped(pids, folder):
    """Steps with a collective each; a stop is agreed on, and every rank 'saves' a file."""

    def entry(config, process, rendezvous):
        join(process, rendezvous)
        with StopRequest() as stop:
            meet()
            pids.sign_in()
            while True:
                asked = torch.tensor(float(stop.requested is not None))
                dist.all_reduce(asked)
                if asked:
                    break
                time.sleep(0.005)
            (folder / f"saved-{process.rank}").touch()
            dist.barrier()
        return 0

    return entry


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stop_signal_lets_the_ranks_save(make_config, pids, in_background, exit_status, tmp_path, number):
    config = make_config(2)
    launcher = in_background(lambda: launch_local(train_until_stopped(pids, tmp_path), config))
    pids.wait_for(2)
    for _ in range(3):  # as a terminal, `timeout` or a scheduler may do
        os.kill(launcher, number)
    assert exit_status(launcher) == 0
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert pids.alive() == []


def test_second_stop_kills(make_config, pids, in_background, exit_status, monkeypatch):
    monkeypatch.setattr(signals, "SAME_REQUEST_S", 0.2)

    def entry(config, process, rendezvous):
        with StopRequest():
            pids.sign_in()
            while True:
                time.sleep(1)

    launcher = in_background(lambda: launch_local(entry, make_config(2)))
    pids.wait_for(2)
    os.kill(launcher, signal.SIGINT)
    time.sleep(0.4)
    assert len(pids.alive()) == 2
    os.kill(launcher, signal.SIGINT)
    assert exit_status(launcher) == 130
    assert pids.alive() == []


def test_stop_before_training_ends_at_once(make_config, pids, in_background, exit_status, capfd):
    def entry(config, process, rendezvous):
        pids.sign_in()
        time.sleep(60)

    launcher = in_background(lambda: launch_local(entry, make_config(2)))
    pids.wait_for(2)
    os.kill(launcher, signal.SIGTERM)
    assert exit_status(launcher) == 0
    assert capfd.readouterr().err.splitlines()[-1] == "stopped by SIGTERM before training began"
    assert pids.alive() == []


def test_stop_signal_right_after_the_fork_is_not_lost(make_config, pids, in_background, exit_status, monkeypatch):
    default = rank.default_signals

    def slowly():  # as on a busy machine: until this is done, the child has its parent's handlers
        pids.sign_in()
        time.sleep(0.5)
        default()

    monkeypatch.setattr(rank, "default_signals", slowly)
    launcher = in_background(lambda: launch_local(lambda config, process, rendezvous: time.sleep(60), make_config(2)))
    pids.wait_for(2)
    os.kill(launcher, signal.SIGTERM)
    assert exit_status(launcher) == 0
    assert pids.alive() == []


def test_kill_9_of_the_launcher_makes_the_ranks_save_and_end(
    make_config, pids, in_background, exit_status, tmp_path, wait_until
):
    config = make_config(2)
    launcher = in_background(lambda: launch_local(train_until_stopped(pids, tmp_path), config))
    pids.wait_for(2)
    os.kill(launcher, signal.SIGKILL)
    assert exit_status(launcher) == -9
    wait_until(lambda: not pids.alive())
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_error_in_the_launcher_leaves_nothing_behind(make_config, pids, monkeypatch):
    def entry(config, process, rendezvous):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pids.sign_in()
        time.sleep(60)

    def broken(*arguments):
        pids.wait_for(2)
        raise RuntimeError("bug in the launcher")

    monkeypatch.setattr(local._Ranks, "supervise", broken)
    with pytest.raises(RuntimeError, match="bug in the launcher"):
        launch_local(entry, make_config(2))
    assert pids.alive() == []


def test_failed_fork_leaves_nothing_behind(make_config, pids, monkeypatch):
    fork, calls = os.fork, []

    def second_fails():
        calls.append(None)
        if len(calls) == 2:
            pids.wait_for(1)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    def entry(config, process, rendezvous):
        pids.sign_in()
        time.sleep(60)

    monkeypatch.setattr(os, "fork", second_fails)
    with pytest.raises(BlockingIOError):
        launch_local(entry, make_config(2))
    assert pids.alive() == []


def test_signal_handlers_and_files_are_given_back(make_config):
    handlers = [signal.getsignal(number) for number in (*signals.STOP_SIGNALS, signal.SIGCHLD)]
    files = len(os.listdir("/proc/self/fd"))
    launch_local(lambda config, process, rendezvous: 0, make_config(2))
    assert [signal.getsignal(number) for number in (*signals.STOP_SIGNALS, signal.SIGCHLD)] == handlers
    assert len(os.listdir("/proc/self/fd")) == files
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)
