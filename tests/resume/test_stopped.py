"""SIGTERM and SIGINT, from a person or a scheduler, at any time: the step ends, the run is saved, the status is 0."""

import os
import signal

import pytest

STEP = "lctrain.train:_agree"


def test_stopped_twice_and_continued(training, reference):
    run = training()
    run.start_held(STEP, 3, processes=2)
    os.kill(run.launcher, signal.SIGTERM)
    run.wait_until(lambda: "SIGTERM" in run.said(1))
    run.go_on()
    status, out, err = run.finish()
    assert (status, err) == (0, "SIGTERM: the ranks finish their step, save and end; once more ends them at once\n")
    assert out.splitlines()[-1] == "SIGTERM: stopping after step 2 of 12"
    assert run.checkpoints() == ["step-00000002"]

    run.start_held(STEP, 5, processes=2)
    os.killpg(run.launcher, signal.SIGINT)  # as Ctrl-C: the terminal signals launcher and ranks
    run.wait_until(lambda: "SIGINT" in run.said(2))
    run.go_on()
    status, out, err = run.finish()
    assert (status, err.count("\n")) == (0, 1)
    assert out.splitlines()[-1] == "SIGINT: stopping after step 6 of 12"
    assert run.checkpoints()[-1] == "step-00000006"
    assert [event["step"] for event in run.events("stop")] == [2, 6]

    run.complete()
    assert run.metrics() == reference.metrics()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_while_the_corpora_are_checked(training, number):
    run = training()
    run.start_held("lctrain.data.prepare:ensure_corpora", 1)
    os.kill(run.launcher, number)
    assert run.finish() == (0, "", f"stopped by {number.name} before training began\n")
    assert not run.run_dir.exists()


def test_stop_while_the_ranks_meet(training):
    run = training()
    run.start_held("lctrain.launch.process:init_process_group", 1, processes=2)
    os.kill(run.launcher, signal.SIGTERM)
    status, out, err = run.finish()
    assert (status, out) == (0, "")
    assert err.splitlines()[-1] == "stopped by SIGTERM before training began"
    assert not (run.run_dir / "checkpoints").exists()


def test_stop_while_the_model_is_built_saves_nothing(training):
    run = training("tracking.plot=true")
    run.start_held("lctrain.train:make_engine", 1, processes=2)
    os.kill(run.launcher, signal.SIGTERM)
    run.wait_until(lambda: "SIGTERM" in run.said(1))
    run.go_on()
    status, out, err = run.finish()
    assert (status, err.count("\n")) == (0, 1)
    assert "SIGTERM: stopping after step 0 of 12" in out
    assert out.splitlines()[-2].startswith("no loss curve: ")
    assert out.splitlines()[-1] == f"report: {run.run_dir}/report.html"
    assert not (run.run_dir / "checkpoints").exists()
    assert run.metrics() == []


def test_stop_while_a_checkpoint_is_read_leaves_it_alone(copy_of_reference):
    run = copy_of_reference(8)
    before = (run.checkpoint(8) / "manifest.json").read_text()
    run.start_held("lctrain.checkpoint.store:load_tensors", 1, processes=2)
    os.kill(run.launcher, signal.SIGTERM)
    run.wait_until(lambda: "SIGTERM" in run.said(1))
    run.go_on()
    status, out, _ = run.finish()
    assert status == 0
    assert out.splitlines()[-1] == "SIGTERM: stopping after step 8 of 12"
    assert run.checkpoints() == ["step-00000004", "step-00000008"]
    assert (run.checkpoint(8) / "manifest.json").read_text() == before


def test_stop_after_the_last_step_lets_the_run_end(copy_of_reference):
    run = copy_of_reference(12, "tracking.plot=true")
    run.start_held("lctrain.train:draw_pictures", 1)
    os.kill(run.launcher, signal.SIGTERM)
    run.wait_until(lambda: "SIGTERM" in run.said(1))
    run.go_on()
    status, out, err = run.finish()
    assert (status, err.count("\n")) == (0, 1)
    assert f"loss curve: {run.run_dir}/loss.png" in out.splitlines()
    assert out.splitlines()[-1] == f"report: {run.run_dir}/report.html"
