"""One record, all outputs."""

from lctrain.tracking.jsonl import read_events, read_metrics
from lctrain.tracking.tracker import open_tracker


def test_rank_0_writes_and_the_others_are_silent(run, make_config, capsys):
    silent = open_tracker(make_config("offline"), 1, 0)
    silent.step({"step": 1})
    silent.event("start")
    silent.message("not shown")
    silent.close()
    assert list(run.path.iterdir()) == []
    tracker = open_tracker(make_config(), 0, 0)
    tracker.event("start", step=0)
    tracker.step({"step": 1, "loss": 2.0, "anything": 3})
    tracker.message("hello")
    tracker.close()
    assert read_metrics(run.metrics) == [{"step": 1, "loss": 2.0, "anything": 3}]
    assert [event["kind"] for event in read_events(run.events)] == ["start"]
    assert [line.split("  loss")[0] for line in capsys.readouterr().out.splitlines()] == ["step   1/100", "hello"]


def test_resume_continues_the_metrics(run, make_config):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = open_tracker(make_config(), 0, start)
        for step in steps:
            tracker.step({"step": step, "start": start})
        tracker.close()
    assert [(record["step"], record["start"]) for record in read_metrics(run.metrics)] == [(1, 0), (2, 0), (3, 2), (4, 2)]
