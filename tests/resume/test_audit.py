"""`lctrain audit` on real runs: undisturbed, resumed with other process counts, and with faults planted in the data order."""

import os
import signal
from pathlib import Path

import pytest

from lctrain.commands.audit import main

PLANTED = str(Path(__file__).with_name("planted.py"))


def test_resumed_twice_and_with_another_data_parallel_size(training, reference, capsys):
    run = training("launcher.processes=4", "trainer.micro_batch=1", "trainer.eval_every=0")
    run.start_held("lctrain.train:_agree", 7, processes=4)
    os.killpg(run.launcher, signal.SIGKILL)
    assert run.finish()[0] == -signal.SIGKILL
    run.start_held("lctrain.train:_agree", 7, "launcher.processes=2", processes=2)  # from step 4, killed after step 10
    os.killpg(run.launcher, signal.SIGKILL)
    assert run.finish()[0] == -signal.SIGKILL
    run.complete("launcher.processes=3", "parallel.cp=3")
    assert main([str(run.run_dir)]) == 0
    out = capsys.readouterr().out
    assert "2 resumes (after step 4, 8; 2, 3, 4 processes), 4 steps computed again" in out
    assert "12 of 12 steps computed again from the corpora" in out
    assert main([str(reference.run_dir)]) == 0


@pytest.mark.parametrize("what", ["duplicate", "skip"])
def test_planted_fault_is_found_after_a_resume_too(copy_of_reference, what, capsys):
    run = copy_of_reference(4)
    status, _, _ = run.run(program=(PLANTED, what, "6"))
    assert status == 0
    assert main([str(run.run_dir)]) == 1
    out = capsys.readouterr().out
    first = next(line for line in out.splitlines() if line.startswith("step 6: samples 20 to 23 (documents "))
    other = "16 to 19 of step 5" if what == "duplicate" else "24 to 27 of step 7"
    assert f"are lost; it used samples {other} (documents " in first
    assert "step 6 was computed again after the restart from step 4 with other samples" in out
