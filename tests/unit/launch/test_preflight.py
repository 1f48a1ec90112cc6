"""The measurements of the preflight on processes of this machine that play nodes."""

import json
import os
import socket

import pytest
import torch

from lctrain.config.launcher import PreflightConfig
from lctrain.launch.preflight import preflight
from lctrain.tracking.jsonl import read_events

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def play(number, names, port, folder, settings):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    verdict = preflight(settings, number, names, "127.0.0.1", port, folder)
    if number == 0:
        (folder / "verdict").write_text(json.dumps([verdict.action, verdict.unfit]))
    return 0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_node_is_measured(in_background, exit_status, tmp_path, port, capfd, count):
    names = [f"n{number}" for number in range(count)]
    settings = PreflightConfig(slow_fraction=0.0, min_memory_gb=0, min_disk_gb=0)
    started = [in_background(lambda n=n: play(n, names, port, tmp_path, settings)) for n in range(count)]
    assert [exit_status(pid) for pid in started] == [0] * count
    assert json.loads((tmp_path / "verdict").read_text()) == ["start", []]
    (event,) = read_events(tmp_path / "events.jsonl")
    assert [node["node"] for node in event["nodes"]] == names
    for node in event["nodes"]:
        assert node["gemm_gflops"] > 0
        assert abs(node["clock_skew_s"]) < 1
        assert (node["link_gb_s"] is None) == (count == 1)
    assert capfd.readouterr().out.count("\nn") == 1 + count  # the heading, and a line per node


def test_a_node_that_does_not_answer_is_named(in_background, exit_status, tmp_path, port, capfd):
    settings = PreflightConfig(timeout_s=1, broken="exclude", slow_fraction=0.0)
    assert exit_status(in_background(lambda: play(0, ["a", "b"], port, tmp_path, settings))) == 0
    assert json.loads((tmp_path / "verdict").read_text()) == ["exclude", ["b"]]
    assert "broken node b: no answer within 1 s\n" in capfd.readouterr().out
