"""The same run under torchrun: its processes in place of the command's own."""

import pytest

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lctrain")


def test_continues_a_run_that_the_local_launcher_began(copy_of_reference, reference):
    run = copy_of_reference(8)
    status, out, _ = run.run(program=TORCHRUN)
    assert status == 0
    assert out.count("continuing after step 8 from") == 1
    assert out.count("step 12/12") == 1
    assert run.metrics() == reference.metrics()
    assert run.checkpoints() == reference.checkpoints()


def test_ranks_whose_torchrun_is_killed_save_and_end(training, reference):
    run = training()
    run.start_to_hold("lctrain.train:_agree", 7, program=TORCHRUN)
    run.held(2)
    run.kill_launcher()
    run.go_on()
    run.wait_until(lambda: not run.processes())
    assert run.said(1, "out").splitlines()[-1] == "SIGTERM: stopping after step 6 of 12"
    assert "continuing after step 6 from" in run.complete()
    assert run.metrics() == reference.metrics()


@pytest.mark.parametrize("mistake", ["trainer.stpes=3", "data.corpora.0.prefix=nowhere", "engine.device=cuda"])
def test_mistake_is_said_once(training, mistake):
    status, out, err = training().run(mistake, program=TORCHRUN, CUDA_VISIBLE_DEVICES="")
    assert status != 0
    assert out == ""
    assert err.count("error: ") == 1
    assert "lctrain/" not in err, "a stack trace"
