"""Timelines: bars from simulations and from real runs, their slots, the trace, the picture, the program."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from lctrain.bench.attention_problem import Problem
from lctrain.launch.ranks import RankPool
from lctrain.parallel.cost import costed_steps
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.strategy import Strategy
from lctrain.timeline.bars import Bar, Phase
from lctrain.timeline.draw import draw_timeline
from lctrain.timeline.record import record
from lctrain.timeline.slots import slots_of
from lctrain.timeline.trace import chrome_trace

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
import timeline as program

SMALL = ["cp=2", "seq=256", "heads=4", "head_dim=16", "dtype=fp32"]


def bar(start, end, kind="compute"):
    return Bar(0, "compute", start, end, kind, "")


def test_overlapping_bars_go_side_by_side_and_slots_are_used_again():
    bars = [bar(0.0, 2.0), bar(1.0, 3.0), bar(2.0, 4.0), bar(2.5, 2.6)]
    assert [slot for slot, _ in slots_of(bars)] == [0, 1, 0, 2]
    assert slots_of([]) == []


def test_trace_has_a_process_per_rank_and_phases_one_after_the_other():
    phases = [Phase("forward", 2.0, (bar(0.0, 2.0),)), Phase("backward", 5.0, (bar(1.0, 5.0, "wait"),))]
    events = chrome_trace("a title", phases)["traceEvents"]
    drawn = [event for event in events if event["ph"] == "X"]
    assert [(event["ts"], event["dur"], event["cat"]) for event in drawn] == [(0.0, 2e6, "forward"), (3e6, 4e6, "backward")]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"rank 0", "compute"}


def test_program_writes_pictures_and_traces(tmp_path):
    files = [tmp_path / name for name in ("a.png", "a.svg", "a.json")]
    assert program.main([*SMALL, "strategy=usp", "cluster=h200", f"output={','.join(map(str, files))}"]) == 0
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in files[1].read_bytes()
    assert json.loads(files[2].read_text())["otherData"]["title"].startswith("usp, 2 ranks, 256 tokens")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["output=picture.gif"], "picture.gif"),
        (["cluster=h200", "output=/nowhere/a.png"], "no folder /nowhere"),
        (["cluster=h200", "strategy=usp", "ulysses=3"], "not a multiple of ulysses=3"),
        (["heads=3", "kv_heads=2"], "not a multiple of kv_heads=2"),
    ],
)
def test_program_refuses_in_one_line(arguments, says, capsys):
    assert program.main([*SMALL[:2], *arguments]) == 1
    shown = capsys.readouterr().out
    assert says in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("name", ["ring", "usp"])
def test_recorded_messages_are_those_of_the_schedule(name):
    problem = Problem(AttentionShape(1, 4, 4, 16, torch.float32), 256, (0, 256), None, "zigzag", 0)
    strategy = Strategy(name, ulysses=2 if name == "usp" else None)
    with closing(RankPool(2)) as pool:
        phases = record(pool, problem, strategy)
    case = strategy, problem.layout(2), problem.mask, problem.shape
    for phase in phases:
        sent = {(b.rank, kind) for b in phase.bars if b.lane == "send" for kind in b.kind.split("+")}
        steps = costed_steps(*case, phase.name)
        assert sent == {(rank, send.kind) for rank, own in enumerate(steps) for step in own for send in step.sends}
        assert all(0 <= b.start <= b.end <= phase.seconds + 1e-9 for b in phase.bars)
        assert {b.rank for b in phase.bars if b.kind == "compute"} == {0, 1}
    draw_timeline("recorded", phases)
