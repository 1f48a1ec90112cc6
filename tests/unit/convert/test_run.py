"""What a conversion leaves behind, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lctrain.checkpoint.store import CheckpointStore
from lctrain.convert import run as run_module
from lctrain.convert.check import verify
from lctrain.convert.native import open_native
from lctrain.convert.safetensors import SafetensorsFolder, SafetensorsWriter
from lctrain.convert.stream import Info
from lctrain.errors import UserError


def left(folder: Path) -> list[str]:
    """Names in a folder but for the input's."""
    return sorted(path.name for path in folder.iterdir() if path.name != "ours")


def test_dry_run_lists_and_writes_nothing(make_folder, run, tmp_path, capsys):
    assert run(input=make_folder(), to="hf", dry_run=True) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.self_attn.q_proj.weight" in out
    assert "layers.2.mixer.q.weight" in out
    assert "every tensor of the input is matched" in out
    assert left(tmp_path) == []


def test_existing_output_needs_a_flag(make_folder, run, tmp_path):
    ours, output = make_folder(), tmp_path / "out"
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(UserError, match="exists: choose another, or overwrite=true"):
        run(input=ours, output=output, to="hf")
    assert left(output) == ["precious"]
    run(input=ours, output=output, to="hf", overwrite=True)
    assert left(output) == ["config.json", "conversion.json", "model.safetensors"]
    assert left(tmp_path) == ["out"]


def test_a_failure_leaves_the_old_output_and_nothing_else(make_folder, run, tmp_path, monkeypatch):
    ours, output = make_folder(), tmp_path / "out"
    run(input=ours, output=output, to="hf")
    before = left(output)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "_carry", fail)
    with pytest.raises(UserError, match="No space left on device"):
        run(input=ours, output=output, to="hf", overwrite=True)
    assert left(output) == before
    assert left(tmp_path) == ["out"]


def test_disk_space_is_checked_first(make_folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"needs 0\.\d+ GB and 0\.00 GB are free"):
        run(input=make_folder(), output=tmp_path / "out", to="hf")
    assert left(tmp_path) == []


def test_output_within_input_is_refused(make_folder, run):
    ours = make_folder()
    for output in (ours, ours / "sub", ours.parent):
        with pytest.raises(UserError, match="lie in each other"):
            run(input=ours, output=output, to="hf", overwrite=True)


def test_a_killed_conversion_leaves_no_output(make_folder, run, tmp_path):
    ours, output = make_folder(), tmp_path / "out"
    code = (
        "import time, sys; from lctrain.convert import run; from lctrain.config.convert import ConvertConfig\n"
        "run._sync = lambda folder: (print('here', flush=True), time.sleep(60))\n"
        f"run.convert(ConvertConfig(to='hf', input={str(ours)!r}, output={str(output)!r}, verify=False))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while "here" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    assert [name for name in left(tmp_path) if not name.startswith(".")] == []
    time.sleep(0.1)
    run(input=ours, output=output, to="hf")
    assert left(tmp_path) == ["out"]  # what the killed one had left is gone too


def test_unknown_tensors_are_an_error_unless_dropped(make_folder, run, tmp_path, capsys):
    ours = make_folder()
    run(input=ours, output=tmp_path / "hf", to="hf")
    source = SafetensorsFolder(tmp_path / "hf")
    infos = {**source.infos, "model.layers.0.self_attn.gate.weight": Info(torch.Size([2]), torch.float32)}
    tensors = {name: source.read(name) if name in source.infos else torch.ones(2) for name in infos}
    writer = SafetensorsWriter(tmp_path / "hf", infos, 10**9, {})
    for name in infos:
        writer.write(name, [tensors[name]])
    writer.close()
    with pytest.raises(UserError, match=r"1 tensors of the input are unknown to the table: model\.layers\.0\.self_attn\.gate"):
        run(input=tmp_path / "hf", output=tmp_path / "back", to="lctrain")
    run(input=tmp_path / "hf", to="lctrain", dry_run=True)
    assert "unmatched: model.layers.0.self_attn.gate.weight" in capsys.readouterr().out
    run(input=tmp_path / "hf", output=tmp_path / "back", to="lctrain", unmatched="drop")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda infos: infos.pop("model.norm.weight"), "has no model.norm.weight"),
        (
            lambda infos: infos.update({"model.norm.weight": Info(torch.Size([16]), torch.float32)}),
            r"model.norm.weight as \[16\], its config makes it \[32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(make_folder, run, tmp_path, change, message):
    run(input=make_folder(), output=tmp_path / "hf", to="hf")
    source = SafetensorsFolder(tmp_path / "hf")
    infos = dict(source.infos)
    change(infos)
    writer = SafetensorsWriter(tmp_path / "hf", infos, 10**9, {})
    for name, info in infos.items():
        writer.write(name, [torch.zeros(info.shape)])
    writer.close()
    with pytest.raises(UserError, match=message):
        run(input=tmp_path / "hf", output=tmp_path / "back", to="lctrain")


def test_a_wrong_result_is_not_kept(make_folder, run, tmp_path, monkeypatch):
    """Break the writing of one tensor: verification sees it."""
    ours = make_folder()
    monkeypatch.setattr("lctrain.convert.check.hf_logits", lambda folder, tokens: torch.zeros(len(tokens), 320))
    assert verify is not None
    with pytest.raises(UserError, match="verification failed"):
        run(input=ours, output=tmp_path / "out", to="hf", verify=True)
    assert left(tmp_path) == []


def test_training_checkpoints_are_read(make_folder, run, tmp_path):
    ours = open_native(make_folder())
    tensors = {name: ours.source.read(name) for name in ours.source.infos}
    state = {"model": tensors, "optimizer": {"step": torch.zeros(1)}}
    checkpoint = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=1).save(3, state, {})
    with pytest.raises(UserError, match=r"say what model it is with config=FILE\.yaml"):
        run(input=checkpoint, output=tmp_path / "back", to="lctrain")
    config = next((tmp_path / "ours" / "model").glob("*.yaml"))
    for source in (checkpoint, tmp_path / "run"):
        run(input=source, output=tmp_path / "back", to="lctrain", config=config, overwrite=True)
        back = SafetensorsFolder(tmp_path / "back")
        assert all(torch.equal(back.read(name), tensor) for name, tensor in tensors.items())
    os.truncate(next(checkpoint.glob("*.distcp")), 100)
    with pytest.raises(UserError, match="is damaged"):
        run(input=checkpoint, output=tmp_path / "worse", to="lctrain", config=config)


def test_nothing_that_is_known(run, tmp_path):
    with pytest.raises(UserError, match="none of the formats that are known"):
        run(input=tmp_path, output=tmp_path / "x", to="hf")
    with pytest.raises(UserError, match="is not a folder"):
        run(input=tmp_path / "nothing", output=tmp_path / "x", to="hf")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "lama"}))
    with pytest.raises(UserError, match="did you mean llama"):
        run(input=tmp_path, output=tmp_path / "x", to="lctrain")
