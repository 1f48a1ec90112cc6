"""What else may happen to a job: nodes that die, other jobs that go first, people who stop it, torchrun, arrays, chains."""

import os
import re

import pytest

from lctrain.tracking.jsonl import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
AGREE = "lctrain.train:_agree"
STEP = (AGREE, 7)
QUICK = "launcher.preflight.enabled=false"


@pytest.mark.parametrize("node", [1, 2])
def test_a_node_goes_down(power, run, reference, node):
    """Node 1 has the batch script and rank 0; of node 2 srun hears nothing until the controller gives it up."""
    run.submit_to_hold(*STEP, QUICK)
    run.wait_until_held()
    power.tool("kill", str(node))
    run.holds.go_on()
    run.wait_until(lambda: run.restarts() >= 1)
    power.tool("start", str(node))
    run.wait_for_end()
    assert run.metrics() == reference
    # A node that comes back is told once more to end what it had; that may hit the new start, which then saves and requeues.
    assert run.events("resume")[0]["step"] == 4
    assert run.events("give_up") == []
    assert len(run.wandb_ids()) == 1


def test_a_node_whose_slurmd_died_trains_on_unseen(power, run, reference):
    """The next start waits on another node; the script of the first must not requeue the job a second time when it ends."""
    run.holds.order(*STEP)
    run.submit_hooked(QUICK, "launcher.nodes=1", "launcher.processes_per_node=4")
    run.wait_until_held()
    node = run.lab.job(run.job)["BatchHost"]
    power.tool("crash", node[-1])
    run.wait_until(lambda: "is still in use by pid" in run.log())
    assert (run.restarts(), run.lab.job(run.job)["BatchHost"]) == (1, "node2" if node == "node1" else "node1")
    os.kill(run.ranks()[3], 9)
    run.holds.go_on()
    run.wait_until(lambda: run.events("superseded") != [])
    run.wait_for_end()
    assert run.restarts() == 1
    assert [event["step"] for event in run.events("resume")] == [4]
    assert run.metrics() == reference


def test_under_torchrun(run, reference):
    run.submit_to_hold(*STEP, QUICK, "launcher.mode=torchrun")
    run.wait_until_held()
    run.hold_next(AGREE, 4)
    run.lab.order("scancel", "--batch", "--signal=USR1", run.job)
    run.wait_until_held()
    assert [event["step"] for event in run.events("stop")] == [6]
    os.kill(run.ranks()[3], 9)
    run.holds.go_on()
    run.wait_for_end()
    assert run.restarts() == 2
    assert run.metrics() == reference
    assert len(run.wandb_ids()) == 1


@pytest.mark.parametrize(
    ("place", "saved"),
    [
        ("lctrain.data.prepare:ensure_corpora", 0),
        ("lctrain.train:make_engine", 0),
        ("lctrain.train:_evaluate", 5),
        ("lctrain.checkpoint.store:save_tensors", 4),
    ],
)
def test_warned_in_every_phase(run, reference, place, saved):
    processes = 1 if "prepare" in place else 4
    run.submit_to_hold(place, 1, QUICK)
    run.wait_until_held(processes)
    run.lab.order("scancel", "--batch", "--signal=USR1", run.job)
    run.wait_for_end()
    assert run.restarts() == 1
    assert [event["reason"] for event in run.events("requeue")] == ["the time limit is near"]
    assert [event["step"] for event in run.events("resume")] == ([saved] if saved else [])
    assert run.metrics() == reference


def test_a_job_that_goes_first(run, reference):
    """SLURM itself warns, ends and requeues the job; the batch script must not requeue it a second time."""
    run.submit_to_hold(*STEP, QUICK)
    run.wait_until_held()
    first = run.lab.order(
        "sbatch", "--parsable", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    ).strip()
    run.wait_until(lambda: run.lab.job(first)["JobState"] == "COMPLETED")
    run.wait_for_end()
    assert run.restarts() == 1
    assert [event["step"] for event in run.events("resume")] == [6]
    assert run.metrics() == reference


def test_stopped_by_a_person_and_submitted_again(run, reference):
    run.submit_to_hold(*STEP, QUICK)
    run.wait_until_held()
    status = run.command("status", str(run.run_dir)).stdout
    assert re.search(rf"^state +job {run.job} RUNNING on node\[1-2\] for 00:0\d:\d\d of 00:30:00$", status, re.M)
    assert re.search(r"^progress +step 6 of 12 \(50%\), loss \d\.\d+, [\d,]+ tok/s, about \d+ s left$", status, re.M)
    assert re.search(r"^checkpoint +step 4, \d+ s ago$", status, re.M)
    assert "step  6/12" in run.command("logs", str(run.run_dir)).stdout
    again = run.command("train", *run.settings, "launcher=slurm", "launcher.nodes=2", "launcher.processes_per_node=2")
    assert again.returncode == 2
    assert f"has job {run.job} in the queue (RUNNING)" in again.stderr

    assert f"job {run.job} finishes its step" in run.command("stop", str(run.run_dir)).stdout
    run.wait_for_end()
    assert run.state() == "COMPLETED"
    assert [event["step"] for event in run.events("stop")] == [6]
    assert run.events("requeue") == []
    assert "is not running" in run.command("stop", str(run.run_dir)).stdout
    assert re.search(r"^stopped +\d+ s ago: lctrain stop$", run.command("status", str(run.run_dir)).stdout, re.M)

    first = run.job
    run.submit(QUICK)
    assert run.job != first
    followed = run.command("logs", str(run.run_dir), "follow=true", "lines=1").stdout
    assert "step 12/12" in followed
    run.wait_for_end()
    assert run.metrics() == reference
    assert len(run.wandb_ids()) == 1


def test_no_checkpoint_over_and_over_is_given_up(run):
    run.submit_to_hold(AGREE, 2, QUICK, "launcher.slurm.restarts=1", "launcher.nodes=1")
    for _ in range(2):
        run.wait_until_held(2)
        run.hold_next(AGREE, 2)
        os.kill(run.ranks()[1], 9)
    run.wait_until(lambda: run.events("give_up") != [])
    (given_up,) = run.events("give_up")
    assert given_up["reason"].endswith("no new checkpoint after 2 starts")
    assert len(run.events("requeue")) == 1


def test_a_chain_in_place_of_requeueing(run, reference):
    printed = run.submit_to_hold(*STEP, QUICK, "launcher.chain=3")
    jobs = re.findall(r"\d+", printed.splitlines()[0].partition(":")[0])
    assert len(jobs) == 3
    run.wait_until_held()
    run.lab.order("scancel", "--batch", "--signal=USR1", jobs[0])
    for run.job in jobs:
        run.wait_for_end()
    assert [run.lab.job(job)["Restarts"] for job in jobs] == ["0", "0", "0"]
    assert [event["step"] for event in run.events("resume")] == [6]
    assert run.metrics() == reference
    assert "nothing left to do: all steps are done" in run.log()


def test_an_array_of_two_runs(run):
    """The last task, which has the number of the whole array, is requeued without the other."""
    printed = run.submit_to_hold(
        AGREE, 2, QUICK, "launcher=slurm_array", "launcher.nodes=1", "trainer.steps=3", "optim.lr=1e-3,3e-4", "parallel.cp=1"
    )
    assert "an array of 2 runs" in printed
    runs = [run.run_dir / "0-lr-0.001", run.run_dir / "1-lr-0.0003"]
    array = run.job
    run.wait_until_held()
    run.lab.order("scancel", "--batch", "--signal=USR1", f"{array}_1")
    run.job = f"{array}_1"
    run.wait_until(lambda: run.restarts() == 1)
    assert run.lab.job(f"{array}_0")["JobState"] == "RUNNING"
    run.holds.go_on()
    for run.job, restarts in ((f"{array}_0", 0), (f"{array}_1", 1)):
        run.wait_for_end()
        assert run.restarts() == restarts
    rates = [read_metrics(folder / "metrics.jsonl")[0]["lr"] for folder in runs]
    assert rates[0] == pytest.approx(rates[1] * 10 / 3)
    status = run.command("status", str(run.run_dir)).stdout
    assert status.count("step 3 of 3 (100%)") == 2
    assert "step 3/3" in run.command("logs", str(runs[1])).stdout
    assert (runs[0] / "config.yaml").read_text().count("group: run\n") == 1


def test_a_broken_node_is_named_and_left_out(run):
    run.submit_hooked(
        "launcher.preflight.broken=exclude", "launcher.nodes=1", "parallel.cp=1", "trainer.steps=2", LCTRAIN_BROKEN_NODE="node1"
    )
    run.wait_for_end()
    assert "broken node node1: 0.0 GB of memory are free" in run.log()
    assert run.restarts() == 1
    assert run.lab.job(run.job)["NodeList"] == "node2"
    assert len(run.metrics()) == 2


def test_settings_that_do_not_fit_are_not_requeued(run):
    run.submit(QUICK, "launcher.nodes=1", "trainer.steps=2", "parallel.cp=1")
    run.wait_for_end()
    run.submit(QUICK, "launcher.nodes=1", "trainer.steps=2", "parallel.cp=1", "model.mlp.d_ff=64")
    run.wait_until(lambda: run.events("give_up") != [])
    assert sum(line.startswith("error: ") for line in run.log().splitlines()) == 1
    assert re.search(r"has model/\S+ as \[[\d, ]+\] float32, the config makes it \[[\d, ]+\] float32", run.log())
    assert run.events("requeue") == []
