"""`lctrain bench plan`: real engines take the memory that was planned, and the table says so."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lctrain.attention_choice import preset
from lctrain.bench import plan as bench
from lctrain.bench.plan_machine import _kernel
from lctrain.cli import main
from lctrain.plan.plan import make_plan


@pytest.fixture
def known_machine(monkeypatch):
    """Not measured."""
    monkeypatch.setattr(bench, "measured_cluster", lambda ranks, shape: preset("cpu_gloo"))


def test_planned_and_measured_stand_side_by_side(known_machine, capsys, tmp_path):
    output = tmp_path / "plan.json"
    assert main(["bench", "plan", "model=tiny", "seq=64", "cases=single,cp2,fsdp2", "steps=1", f"output={output}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("equal") == 3
    assert "DIFFERENT" not in shown
    results = json.loads(output.read_text())["results"]
    assert [row["case"] for row in results] == ["single", "cp2", "fsdp2"]
    for row in results:
        assert row["planned_bytes"] == row["measured_bytes"]
        assert row["error"] == pytest.approx(row["planned_s"] / row["measured_s"] - 1)
        assert sum(row["causes_s"].values()) == pytest.approx(row["planned_s"])


def test_wrong_memory_fails_the_command(known_machine, monkeypatch, capsys):
    monkeypatch.setattr(bench, "make_plan", lambda config: _less(make_plan(config)))
    assert main(["bench", "plan", "model=tiny", "seq=64", "cases=single", "steps=1"]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def _less(plan):
    stage = dataclasses.replace(plan.memory[0], weights=plan.memory[0].weights - 4)
    return dataclasses.replace(plan, memory=(stage,))


def test_a_measured_kernel_survives_the_way_through_the_config():
    device = preset("cpu_gloo").build().device
    kernel = _kernel(device, torch.float32)
    cluster = preset("cpu_gloo").model_copy(update={"kernel": kernel})
    built = cluster.build().device
    assert built.forward.rows == device.forward.rows
    assert built.causal_backward.flops[0][0] == pytest.approx(device.causal_backward.flops[0][0])
    assert built.call_s == pytest.approx(device.call_s)
    assert kernel.dtype == "fp32"
