"""kill -9 of a rank, of the launcher, in the middle of a step or of a checkpoint: the same command then continues exactly."""

import os
import signal

STEP = "lctrain.train:_agree"  # once per step, before it
WRITE = "lctrain.checkpoint.store:write_manifest"  # rank 0, all tensors of a checkpoint being written


def ranks(training, count=2) -> list[int]:
    """Pids in order of ranks, from the logs that name them."""
    logs = [(training.run_dir / "log" / f"rank{rank}.log").read_text() for rank in range(count)]
    return [int(log.rpartition("pid ")[2].split()[0]) for log in logs]


def test_a_rank_is_killed_then_another_in_the_middle_of_a_checkpoint(training, reference):
    run = training()
    run.start_held(STEP, 7, processes=2)
    victim = ranks(run)[1]
    os.kill(victim, signal.SIGKILL)
    run.go_on()
    status, out, err = run.finish()
    assert status == 128 + 9
    (line,) = err.splitlines()
    assert line.startswith(f"rank 1 (pid {victim}) was killed by SIGKILL; stopping the other process; continue with: ")
    assert line.endswith(f"run_dir={run.run_dir}")
    assert "step  6/12" in out
    assert run.checkpoints() == ["step-00000004"]
    assert run.events("failure")[0]["rank"] == 1

    (writer,) = run.start_held(WRITE, 1)  # the first of this start: step 8
    (unfinished,) = (run.run_dir / "checkpoints").glob("tmp-step-00000008-*")
    assert {"__0_0.distcp", ".metadata"} <= {path.name for path in unfinished.iterdir()}
    os.kill(writer, signal.SIGKILL)
    status, out, err = run.finish()
    assert status == 128 + 9
    (line,) = err.splitlines()
    assert line.startswith(f"rank 0 (pid {writer}) was killed by SIGKILL; stopping the other process; continue with: ")
    assert "continuing after step 4 from" in out
    assert len(run.metrics()) == 8
    assert unfinished.exists()

    out = run.complete()
    assert "continuing after step 4 from" in out
    assert run.metrics() == reference.metrics()
    assert run.checkpoints() == ["step-00000004", "step-00000008", "step-00000012"]  # and no tmp-*
    assert [event["step"] for event in run.events("resume")] == [4, 4]


def test_the_launcher_is_killed_then_again_in_the_middle_of_a_checkpoint(training, reference):
    run = training()
    run.start_held(STEP, 7, processes=2)
    first, alive = run.launcher, ranks(run)
    run.kill_launcher()
    run.start_to_hold(WRITE, 1)  # the same command at once: it waits for the ranks
    run.wait_until(lambda: f"{first} on {os.uname().nodename}) is gone; waiting for its ranks to end" in run.said(2))
    assert set(alive) < set(run.processes())
    run.go_on(1)
    run.held(1)
    assert run.said(1, "out").splitlines()[-1] == "SIGTERM: stopping after step 6 of 12"  # what the kernel told the ranks
    assert "continuing after step 6 from" in run.said(2, "out")

    run.kill_launcher()
    assert [name for name in run.checkpoints() if name.startswith("step-")] == ["step-00000004", "step-00000006"]
    run.go_on(2)
    run.wait_until(lambda: not run.processes())
    assert run.said(2, "out").splitlines()[-1] == "SIGTERM: stopping after step 8 of 12"
    assert run.checkpoints()[-1] == "step-00000008"  # they finish what they write

    assert "continuing after step 8 from" in run.complete()
    assert run.metrics() == reference.metrics()


def test_the_machine_dies_in_the_middle_of_a_checkpoint(training, reference):
    run = training()
    run.start_held(WRITE, 1)
    os.killpg(run.launcher, signal.SIGKILL)
    assert run.finish()[0] == -signal.SIGKILL
    assert [name.rpartition("-")[0] for name in run.checkpoints()] == ["tmp-step-00000004"]
    with open(run.run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a line torn by the crash
    assert "continuing" not in run.complete()
    assert run.metrics() == reference.metrics()
    assert run.checkpoints() == reference.checkpoints()


def test_sharded_bf16_run(training):
    settings = (
        "engine.data_parallel=fsdp",
        "engine.dtype=bf16",
        "engine.activation_checkpointing=layer",
        "parallel.attention=all_gather",
        "parallel.layout=contiguous",
    )
    whole = training(*settings)
    whole.complete()
    run = training(*settings)
    run.start_held(STEP, 7, processes=2)
    os.kill(ranks(run)[1], signal.SIGKILL)
    run.go_on()
    status, _, err = run.finish()
    assert status == 128 + 9
    assert "rank 1" in err
    assert "continuing after step 4 from" in run.complete()
    assert run.metrics() == whole.metrics()
