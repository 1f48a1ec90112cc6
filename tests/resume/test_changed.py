"""Resuming with other settings: another number of ranks and more steps are fine, other data and another model are not."""

import pytest


@pytest.mark.parametrize(
    "layout",
    [
        ("launcher.processes=3", "parallel.cp=3", "parallel.layout=striped", "parallel.attention=all_gather"),
        ("launcher.processes=4", "trainer.micro_batch=1", "engine.data_parallel=fsdp"),
    ],
    ids=["cp=3", "dp=2 fsdp"],
)
def test_another_layout_continues_with_the_same_losses(copy_of_reference, reference, layout):
    run = copy_of_reference(4)
    assert "continuing after step 4 from" in run.complete(*layout)
    for now, then in zip(run.metrics(), reference.metrics(), strict=True):
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-5)
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=1e-4)
        assert now.get("eval_loss") == (pytest.approx(then["eval_loss"], rel=1e-5) if "eval_loss" in then else None)
        for exact in ("step", "lr", "digest", "tokens", "targets", "consumed"):
            assert now[exact] == then[exact]
    assert "launcher.processes: 2 -> " in " ".join(run.events("config")[-1]["changes"])


def test_other_data_and_other_models_are_refused_and_more_steps_are_not(copy_of_reference, reference):
    run = copy_of_reference(12)
    config = (run.run_dir / "config.yaml").read_text()
    for change, message in (
        ("trainer.seq_len=204", "trainer.seq_len is 204, but checkpoint {} was made with 203: continuing would repeat or skip"),
        ("model.d_model=64", "checkpoint {} has model/embedding as [257, 32] float32, the config makes it [257, 64] float32"),
        ("resume=never", "resume=never, but run_dir={run} has checkpoint step-00000012; choose another run_dir"),
    ):
        status, out, err = run.run(change)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: " + message.format(run.checkpoint(12), run=run.run_dir))
    assert run.metrics() == reference.metrics()
    assert (run.run_dir / "config.yaml").read_text() == config  # it still fits the checkpoints that are there

    out = run.complete("trainer.steps=14")
    assert "continuing after step 12 from" in out
    assert "changed since the last start: " in out
    assert "trainer.steps: 12 -> 14" in out
    assert run.metrics()[:12] == reference.metrics()
    assert [record["step"] for record in run.metrics()] == list(range(1, 15))
    assert run.events("config")[-1]["changes"][-1] == "trainer.steps: 12 -> 14"


def test_from_an_earlier_checkpoint_by_its_path(copy_of_reference, reference):
    run = copy_of_reference(12)
    status, out, err = run.run(f"resume={run.checkpoint(4)}", "optim.lr=0.01")
    assert (status, err) == (0, "")
    assert "warning: a checkpoint later than step 8, which the run no longer leads to, is now " in out
    now, then = run.metrics(), reference.metrics()
    assert now[:5] == [*then[:4], {**then[4], "lr": now[4]["lr"], "eval_loss": now[4]["eval_loss"]}]
    assert now[5]["loss"] != then[5]["loss"]
    assert len(now) == 12
