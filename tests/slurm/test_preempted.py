"""A job that is warned of its time limit, and one that loses a rank, goes on as if nothing had happened."""

import math
import os
import signal

import pytest

pytestmark = pytest.mark.timeout(600)


def test_warned_of_the_time_limit_and_later_robbed_of_a_rank(run, reference):
    """One job of 2 x 2 processes with three starts: the losses are those of the run that nobody disturbed."""
    run.submit_to_hold("lctrain.train:_agree", 7, "launcher.slurm.warn_s=100")
    run.wait_until_held()
    run.hold_next("lctrain.train:_agree", 4)
    minutes = math.ceil(elapsed_s(run.lab.job(run.job)["RunTime"]) / 60) + 1
    run.lab.order("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")
    run.wait_until(lambda: run.restarts() == 1)
    run.lab.order("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")
    (stop,) = run.events("stop")
    assert (stop["step"], stop["signal"]) == (6, "SIGUSR1")
    assert [event["reason"] for event in run.events("requeue")] == ["the time limit is near"]
    assert (run.run_dir / "checkpoints" / "step-00000006").is_dir()

    run.wait_until_held()
    ranks = run.ranks()
    assert sorted(ranks) == [0, 1, 2, 3]
    os.kill(ranks[3], signal.SIGKILL)
    run.holds.go_on()
    run.wait_for_end()
    assert run.restarts() == 2
    assert run.events("requeue")[1]["reason"].startswith("a process ended (status ")
    assert [event["step"] for event in run.events("resume")] == [6, 8]
    assert [event["reason"] for event in run.events("finished")] == ["all steps are done"]

    assert run.metrics() == reference
    assert len(list((run.run_dir / "wandb").glob("offline-run-*"))) == 3
    assert len(run.wandb_ids()) == 1
    assert [[node["node"] for node in event["nodes"]] for event in run.events("preflight")] == [["node1", "node2"]] * 3
    assert run.ranks() == {}


def elapsed_s(text: str) -> int:
    """SLURM's 1-02:03:04 or 02:03:04 in seconds."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
