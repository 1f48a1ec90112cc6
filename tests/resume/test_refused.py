"""What a person gets wrong ends at once, in one clear line, with status 2, no trace, no process and no checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lctrain.data.indexed import IndexedWriter

WITHOUT_WANDB = "import sys; sys.modules['wandb'] = None; from lctrain.cli import main; sys.exit(main())"


def refusal(run, *more, **how) -> str:
    """The one line that a refused command says."""
    status, out, err = run.run(*more, **how)
    assert status == 2, (status, out, err)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert out == ""
    assert not (run.run_dir / "checkpoints").exists()
    return err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["modle=tiny"], "unknown setting modle (argument modle=tiny): did you mean model?"),
        (["+trainer.stpes=3"], "unknown setting trainer.stpes (argument +trainer.stpes=3): did you mean trainer.steps?"),
        (
            ["parallel.cp=3", "launcher.processes=4"],
            "launcher.processes=4 is not a multiple of parallel.cp=3; set launcher.processes to a multiple of 3,"
            " or with 4 processes parallel.cp to 1, 2, 4",
        ),
        (["run_dir="], "run_dir=: must be text, not empty"),
    ],
)
def test_settings(training, arguments, line):
    run = training()
    assert refusal(run, *arguments) == line
    assert not run.run_dir.exists()


def test_missing_corpus(training, tmp_path):
    line = refusal(training(f"data.corpora.0.prefix={tmp_path}/none"))
    assert line == (
        f"corpus {tmp_path}/none does not exist: run lctrain data prepare input=<files> output={tmp_path}/none tokenizer=bytes"
    )


def test_empty_corpus(training, tmp_path):
    with IndexedWriter(str(tmp_path / "empty"), 257) as writer:
        writer.finish("{}")
    (tmp_path / "empty.json").unlink()  # as Megatron's own tools would write it
    line = refusal(training(f"data.corpora.0.prefix={tmp_path}/empty"))
    assert line == f"corpus {tmp_path}/empty has no tokens: prepare it from files that have text"


def test_token_ids_above_the_vocabulary(training, corpus):
    line = refusal(training("model.vocab_size=200"))
    assert line == f"corpus {corpus} has token ids up to 256, but model.vocab_size=200: set model.vocab_size=257"


def test_run_directory_that_cannot_be_made(training, tmp_path):
    (tmp_path / "file").write_text("")
    line = refusal(training(f"run_dir={tmp_path}/file/run"))
    assert line == f"run_dir={tmp_path}/file/run cannot be used: Not a directory; choose another run_dir"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_directory_without_permission(training):
    run = training()
    run.folder.chmod(0o500)
    try:
        assert "cannot be used: Permission denied; choose another run_dir" in refusal(run)
    finally:
        run.folder.chmod(0o700)


def test_wandb_that_is_not_installed(training):
    run = training("tracking.wandb.mode=offline")
    assert refusal(run, program=("-c", WITHOUT_WANDB)) == (
        "tracking.wandb.mode=offline needs wandb: pip install 'lctrain[wandb]', or set it to disabled"
    )
    assert not run.run_dir.exists()


def test_cuda_that_is_not_there(training):
    line = refusal(training("engine.device=cuda"), CUDA_VISIBLE_DEVICES="")
    assert line == "engine.device=cuda, but torch sees no CUDA device here; use engine.device=cpu or auto"


def test_checkpoint_that_does_not_exist(training):
    line = refusal(training("resume=nowhere"))
    assert line == "checkpoint nowhere does not exist; name a folder such as <run_dir>/checkpoints/step-00000100"


def test_loss_that_is_not_finite(training):
    run = training("optim.lr=1e30", "checkpoint.every=1")
    status, _, err = run.run()
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: step 2: loss ")
    assert "rank 0, sample 4, document" in err
    assert err.endswith("stopped, checkpoints stay as they were\n")
    assert run.checkpoints() == ["step-00000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of half a megabyte, and a function that makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> bool:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode == 0

    if sys.platform != "linux" or os.geteuid() != 0 or not mount("size=500k"):
        pytest.skip("only root may mount a small disk")
    yield place, lambda: mount("remount,size=50m")
    subprocess.run(["umount", "--lazy", place], check=True)


def test_disk_that_is_full_at_a_checkpoint(training, reference, small_disk):
    place, enlarge = small_disk
    run = training(f"run_dir={place}/run")
    run.run_dir = Path(place, "run")
    status, _, err = run.run()
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith(f"error: checkpoint {run.checkpoint(8)} cannot be written: No space left on device; it needs ")
    assert err.endswith(" are free; earlier checkpoints are untouched\n")
    assert run.checkpoints() == ["step-00000004"]
    assert enlarge()
    assert "continuing after step 4 from" in run.complete()
    assert run.metrics() == reference.metrics()


LIMITED = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
    "from lctrain.cli import main; sys.exit(main())"
)


def test_disk_that_fills_up_in_the_middle_of_a_checkpoint(training):
    run = training()
    status, out, err = run.run(program=("-c", LIMITED))
    assert (status, err.count("\n")) == (2, 1), err
    assert err.startswith(f"error: checkpoint {run.checkpoint(4)} cannot be written: File too large; it needs ")
    assert "step  4/12" in out
    assert run.checkpoints() == []
