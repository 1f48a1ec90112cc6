"""Damaged checkpoints are named and passed over; the run continues exactly from the newest whole one."""


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_a_flipped_byte_and_a_cut_file(copy_of_reference, reference):
    run = copy_of_reference(12)
    flip_a_byte(run.checkpoint(12) / "__0_0.distcp")
    cut = run.checkpoint(8) / "__1_0.distcp"
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-100])
    status, out, err = run.run()
    assert status == 0
    assert err.splitlines() == [
        f"warning: checkpoint {run.checkpoint(12)} is not used: __0_0.distcp is damaged: its content does not match its hash",
        f"warning: checkpoint {run.checkpoint(8)} is not used: __1_0.distcp is damaged: {size - 100} bytes instead of {size}",
    ]
    assert f"continuing after step 4 from {run.checkpoint(4)}" in out
    assert run.metrics() == reference.metrics()
    # The damaged one of step 12 is set aside at the first save, that of step 8 replaced by a whole one.
    assert [name for name in run.checkpoints() if name.startswith("step-")] == reference.checkpoints()
    assert run.complete().splitlines()[-1].startswith("the run already has its trainer.steps=12 steps; raise it to train on, ")


def test_a_missing_manifest_then_nothing_whole_at_all(copy_of_reference, reference):
    run = copy_of_reference(12)
    (run.checkpoint(12) / "manifest.json").unlink()
    status, out, err = run.run()
    assert status == 0
    assert err == (
        f"warning: checkpoint {run.checkpoint(12)} is not used: manifest.json is missing: the checkpoint was not finished\n"
    )
    assert "continuing after step 8 from" in out
    assert run.metrics() == reference.metrics()

    for step in (4, 8, 12):
        flip_a_byte(run.checkpoint(step) / ".metadata")
    status, out, err = run.run()
    assert (status, out) == (2, "")
    *warnings, line = err.splitlines()
    assert [str(run.checkpoint(step)) in warning for step, warning in zip((12, 8, 4), warnings, strict=True)] == [True] * 3
    assert line == (
        f"error: no checkpoint in {run.run_dir}/checkpoints is whole (3 damaged): restore one,"
        " or delete them all to start the run from its beginning"
    )
    assert run.metrics() == reference.metrics()
