"""`lctrain plan` as a user meets it, with tiny models."""

from __future__ import annotations

import json

import pytest

from lctrain.cli import main
from lctrain.report.planned import planned_rows

TINY = ["model=tiny", "trainer.seq_len=512", "engine.device=cpu"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Plans go into run directories."""
    monkeypatch.chdir(tmp_path)


def test_one_plan(capsys, tmp_path):
    output = tmp_path / "plan.json"
    assert main(["plan", *TINY, "parallel.cp=2", "trainer.steps=7", f"plan.output={output}"]) == 0
    shown = capsys.readouterr().out
    for words in ("on cpu_gloo", "dp 1 x cp 2", "fits:", "matrix products", "attention", "tokens/s per device", "7 steps"):
        assert words in shown, words
    assert max(map(len, shown.splitlines())) <= 100
    plan = json.loads(output.read_text())
    causes = dict(plan["step_s"])
    assert sum(value for name, value in causes.items() if name != "total") == pytest.approx(causes["total"], rel=1e-12)
    (stage,) = plan["memory"]
    assert sum(value for name, value in stage.items() if name != "total") == stage["total"]
    assert plan["fits"] is True
    assert plan["run_s"] == pytest.approx(7 * causes["total"])
    assert plan["grid"] == {"pp": 1, "dp": 1, "cp": 2, "tp": 1}


def test_stages_of_warm_up_have_steps_of_their_own(capsys, tmp_path):
    output = tmp_path / "plan.json"
    words = ["trainer.steps=10", "trainer.stages=[{steps: 4, seq_len: 128}]"]
    assert main(["plan", *TINY, *words, f"plan.output={output}"]) == 0
    plan = json.loads(output.read_text())
    assert 6 * plan["step_s"]["total"] < plan["run_s"] < 10 * plan["step_s"]["total"]


def test_what_does_not_fit_comes_with_what_would(capsys):
    assert main(["plan", *TINY, "cluster=cpu_gloo", "cluster.device.memory_gb=0.03", "trainer.micro_batch=4"]) == 1
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown
    for change in ("engine.activation_checkpointing=layer", "trainer.micro_batch=2", "parallel.cp=2"):
        assert change in shown


def test_the_run_directory_has_the_plan_and_the_report_can_read_it(tmp_path):
    assert main(["plan", *TINY, "run_dir=runs/planned"]) == 0
    plan = json.loads((tmp_path / "runs/planned/plan.json").read_text())
    rows = planned_rows(plan, [{"step_s": 2 * plan["step_s"]["total"]}])
    assert rows[0][3] == "2.00"
    assert main(["plan", *TINY, "run_dir=/proc/nowhere"]) == 2


def test_search(capsys, tmp_path):
    output = tmp_path / "found.json"
    assert main(["plan", *TINY, "plan.search=true", "plan.gpus=2", "plan.shown=1", f"plan.output={output}"]) == 0
    shown = capsys.readouterr().out
    assert "best: parallel." in shown
    found = json.loads(output.read_text())
    assert len(found) == 4  # dp 2 and cp 2, with DDP and FSDP
    speeds = [plan["tokens_per_s_per_device"] for plan in found]
    assert speeds == sorted(speeds, reverse=True)


def test_a_cluster_can_be_planned_for_where_there_is_no_gpu(capsys):
    words = ["engine.device=cuda", "launcher=slurm", "launcher.nodes=2", "launcher.processes_per_node=2"]
    assert main(["plan", *TINY, *words, "cluster=h200", "parallel.cp=2"]) == 0
    assert "4 processes = dp 2 x cp 2" in capsys.readouterr().out
    assert main(["plan", *TINY, *words]) == 2
    assert "cluster=h200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cluster=h20"], "did you mean cluster=h200"),
        (["plan.search=true"], "plan.gpus=64"),
        (["plan.gpus=8"], "plan.search=true"),
        (["plan.search=true", "plan.gpus=0"], "plan.gpus=0"),
        (["plan.serch=true"], "did you mean plan.search"),
        (["plan.reserve=1"], "plan.reserve=1"),
        (["plan.output=/nowhere/plan.json"], "plan.output=/nowhere/plan.json"),
        (["parallel.tp=2"], "parallel.tp=2"),
        (["cluster=h200", "cluster.device=null"], "cluster.device.memory_gb"),
        (["cluster=h200", "cluster.device.published=abacus", "engine.dtype=bf16"], "published=abacus"),
    ],
)
def test_mistakes_are_one_line(words, says, capsys):
    assert main(["plan", *TINY, *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1


def test_help(capsys):
    assert main(["plan", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "plan.search=true plan.gpus=N" in shown
    assert "plan.reserve" in shown
