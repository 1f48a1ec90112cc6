"""Who a process is, and meeting the others."""

import os
import socket
import time

import pytest
import torch
import torch.distributed as dist

from lctrain.errors import UserError
from lctrain.launch.local import launch_local
from lctrain.launch.process import Process, init_process_group


def test_from_env():
    assert Process.from_env({}) is None
    assert Process.from_env({"RANK": "0"}) is None
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert Process.from_env(torchrun) == Process(5, 8, 1, 4)
    assert Process.from_env({"RANK": "1", "WORLD_SIZE": "2"}) == Process(1, 2, 1, 2)


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "2"},
    ],
)
def test_impossible_env_is_refused(env):
    with pytest.raises(UserError, match="RANK"):
        Process.from_env(env)


def test_one_process_needs_no_rendezvous(in_background, exit_status):
    def alone():
        init_process_group(Process(0, 1, 0, 1), None, "cpu", 10)
        dist.all_reduce(torch.ones(1))
        return dist.get_world_size()

    assert exit_status(in_background(alone)) == 1


def test_meeting_through_the_environment(in_background, exit_status):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank(number):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        torch.set_num_threads(1)
        init_process_group(Process(number, 2, number, 2), None, "cpu", 10)
        total = torch.ones(1)
        dist.all_reduce(total)
        return int(total)

    started = [in_background(lambda number=number: rank(number)) for number in range(2)]
    assert [exit_status(pid) for pid in started] == [2, 2]


def test_blocked_collective_ends_after_the_timeout(make_config, capfd):
    def entry(config, process, rendezvous):
        init_process_group(process, rendezvous, "cpu", config.launcher.timeout_s)
        if process.rank == 0:
            dist.all_reduce(torch.ones(1))
        time.sleep(30)

    begin = time.monotonic()
    assert launch_local(entry, make_config(2, timeout_s=1, grace_s=1)) == 1
    assert time.monotonic() - begin < 8
    assert "rank 0" in capfd.readouterr().err


def test_rank_that_waits_for_a_missing_one_gives_up(make_config, capfd):
    def entry(config, process, rendezvous):
        if process.rank == 1:
            time.sleep(30)
        init_process_group(process, rendezvous, "cpu", config.launcher.timeout_s)

    begin = time.monotonic()
    assert launch_local(entry, make_config(2, timeout_s=1, grace_s=1)) == 1
    assert time.monotonic() - begin < 10
