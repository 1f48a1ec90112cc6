"""checkpoint.asynchronous=true in whole runs: the same run, killed while it writes, and refused by its disk."""

import os
import signal


def test_killed_while_writing_and_continued(training, reference):
    run = training("checkpoint.asynchronous=true")
    # Rank 0 is killed by its own hand while the writer waits before the manifest of step 8 and the steps go on.
    (writer,) = run.start_held("lctrain.checkpoint.store:write_manifest", 2)
    run.wait_until(lambda: "step 10/12" in run.said(1, "out"))  # two steps past the checkpoint that is being written
    os.kill(writer, signal.SIGKILL)
    status, _, _ = run.finish()
    assert status == 128 + 9
    assert len(list((run.run_dir / "checkpoints").glob("tmp-step-00000008-*"))) == 1
    assert "continuing after step 4 from" in run.complete()
    assert run.metrics() == reference.metrics()
    assert run.checkpoints() == reference.checkpoints()
    assert all("stall_s" in event for event in run.events("checkpoint"))


def test_lost_permission_ends_the_run_with_one_line(training, reference):
    run = training("checkpoint.asynchronous=true")
    run.start_held("lctrain.checkpoint.store:hash_files", 2, processes=2)
    folder = run.run_dir / "checkpoints"
    (unfinished,) = folder.glob("tmp-step-00000008-*")
    unfinished.rename(folder / "gone")  # the file system has lost it: for root, permissions would not do
    run.go_on()
    status, _, err = run.finish()
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith(f"error: checkpoint {run.checkpoint(8)} cannot be written: No such file or directory")
    assert "continuing after step 4 from" in run.complete()
    assert run.metrics() == reference.metrics()
