"""The page holds what the run's files say, whatever state the run is in."""

import re
from html.parser import HTMLParser

import pytest

from lctrain.commands.report import main
from lctrain.errors import UserError
from lctrain.report.page import render, write_report
from lctrain.report.planned import planned_otherwise, planned_rows
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import append_event
from lctrain.whole_file import write_json

EMPTY = {"meta", "path", "rect", "circle"}


class Page(HTMLParser):
    """Titles of figures, and a check that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.marks = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.marks += dict(attributes).get("class") == "mark"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        assert tag in EMPTY

    def handle_data(self, data):
        if self.open and self.open[-1] == "h3":
            self.titles.append(data)


def test_every_group_of_charts_is_there_and_restarts_are_marked(make_run):
    run = make_run(40)
    page = Page(render(run))
    assert len(page.titles) >= 16
    assert {
        "Loss", "Gradient norm", "Learning rate", "Throughput", "Model FLOPs utilisation", "Step time", "Data wait",
        "Peak memory", "Memory by kind", "Context-parallel imbalance", "Loss by position", "Slowest rank", "Time by rank",
        "Exposed communication", "Experts: load", "Experts: max violation", "Experts: largest selection bias",
        "Checkpoint time", "Tokens trained on", "Recall by depth", "Recall over the run",
    } <= set(page.titles)  # fmt: skip
    assert page.marks >= 12  # a restart in every chart over steps, and the skipped step in that of the loss
    text = render(run)
    assert "restart after step 20" in text
    assert "step 7 was skipped" in text
    assert "finished, 40 steps" in text


def test_saves_in_the_background_show_what_steps_waited(make_run):
    run = make_run(10)
    assert "What each save held the loop up" in render(run)
    append_event(run.events, "checkpoint", step=20, seconds=5.0, stall_s=0.25)
    text = render(run)
    assert "what of it the loop waited for" in text
    assert "&quot;0.25&quot;" in text


def test_recall_is_shown_by_length_and_depth(make_run):
    text = render(make_run(40))
    assert "<title>context 256, place of the passage in its context, % 100: 90 %</title>" in text
    assert "<title>context 128, place of the passage in its context, % 0: -5 %</title>" in text
    assert text.count("<title>context 256") == 2  # one place of three has no number
    assert 'class="cold"' in text[text.index("<title>context 128") - 200 : text.index("<title>context 128")]


@pytest.mark.parametrize("steps", [1, 2, 3, 25])
def test_short_and_unfinished_runs(make_run, steps):
    text = render(make_run(steps))
    page = Page(text)
    assert "Loss" in page.titles
    assert f"unfinished, step {steps} of 40" in text
    assert "nan" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S).lower().replace("nanos", "")


def test_a_failure_is_said(make_run):
    run = make_run(3)
    append_event(run.events, "failure", rank=2, message="rank 2 died")
    text = render(run)
    assert "failed, step 3 of 40" in text
    assert '<td class="bad">failure</td>' in text
    assert "rank 2 died" in text


def test_a_run_without_a_step_says_so(make_run):
    text = render(make_run(0))
    assert Page(text).titles == []
    assert "No step has been finished yet" in text
    assert "config.yaml" in text


def test_a_long_run_stays_a_small_page(make_run):
    assert len(render(make_run(3000, total=3000))) < 1_500_000


def test_no_run_is_a_message(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        write_report(RunDir(tmp_path / "missing"))
    with pytest.raises(UserError, match="no run directory"):
        write_report(RunDir(tmp_path))


def test_torn_files_do_not_stop_it(make_run):
    run = make_run(3)
    run.environment.write_text('{"host": ')
    run.config.write_text("a: [")
    with open(run.metrics, "a") as file:
        file.write('{"step": 4, "lo')
    assert "Loss" in Page(render(run)).titles


def test_text_from_a_run_is_text_in_the_page(make_run):
    run = make_run(3, name="<b>bold")
    append_event(run.events, "stop", signal="<script>alert(1)</script>")
    text = render(run)
    Page(text)
    assert "<b>bold" not in text
    assert text.count("<script>") == 1


def test_the_verify_report_and_earlier_configs(make_run):
    run = make_run(3)
    (run.path / "config.1.yaml").write_text("optim: {lr: 0.5}\n")
    check = {"name": "gradients", "value": 1e-7, "limit": 1e-5, "passed": True}
    result = {"layout": "cp2", "passed": True, "notes": [], "problem": None, "seconds": 3.0, "checks": [check]}
    write_json(run.path / "verify_layout.json", {"results": [result, {**result, "passed": False, "problem": "rank 1 hung"}]})
    text = render(run)
    Page(text)
    assert "Verified layout" in text
    assert "rank 1 hung" in text
    assert "config.1.yaml" in text


PLAN = {
    "processes": 2,
    "step_s": {"total": 2.0},
    "tokens_per_s_per_device": 50.0,
    "mfu": 0.4,
    "memory": [{"weights": 2**20, "gradients": 2**20, "optimizer": 2**21, "total": 2**23}],
}


def test_the_plan_beside_the_run(make_run):
    run = make_run(3)
    write_json(run.path / "plan.json", PLAN)
    text = render(run)
    Page(text)
    assert "Planned and measured" in text
    records = [{"step_s": s, "tokens_per_s": 200.0, "mfu": 0.2, "memory_weights_mb": 1.0, "memory_mb": 4.0} for s in (1, 3, 5)]
    rows = planned_rows(PLAN, records)
    assert rows[:4] == [
        ("step, s", "2", "3", "1.50"),
        ("tokens/s per process", "50", "100", "2.00"),
        ("MFU, %", "40", "20", "0.50"),
        ("weights, MiB", "1", "1", "1.00"),
    ]
    assert rows[4:] == [("gradients, MiB", "1", "", ""), ("optimizer, MiB", "2", "", ""), ("memory, MiB", "8", "4", "0.50")]
    config = {"model": {"name": "tiny"}, "parallel": {"cp": 2, "dp": None}, "trainer": {"global_batch": 2, "seq_len": 8}}
    there = {"model": "tiny", "grid": {"cp": 1, "dp": 4}, "tokens_per_step": 16, "engine": "torch"}
    assert planned_otherwise(there, config) == "cp 1, here 2"
    assert planned_otherwise({**there, "grid": {"cp": 2}}, config) == planned_otherwise(there, {}) == ""
    for torn in (None, [], {}, {**PLAN, "memory": []}, {**PLAN, "mfu": "much"}):
        assert planned_rows(torn, records) == []


def test_the_command_writes_beside_the_run_or_where_told(make_run, tmp_path, capsys):
    run = make_run(3)
    assert main([str(run.path)]) == 0
    assert "Loss" in Page(run.report.read_text()).titles
    assert str(run.report) in capsys.readouterr().out
    assert main([str(run.path), f"output={tmp_path / 'page.html'}"]) == 0
    assert (tmp_path / "page.html").exists()
