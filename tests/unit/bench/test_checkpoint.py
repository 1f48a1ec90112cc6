"""`lctrain bench checkpoint` measures all ways, stores them, and leaves nothing behind."""

import json

import pytest

from lctrain.commands.bench import main
from lctrain.errors import UserError


def test_a_small_state(tmp_path, capsys):
    place, output = tmp_path / "disk", tmp_path / "result.json"
    place.mkdir()
    assert (
        main(["checkpoint", "mb=1", "tensors=2", "repeats=1", "steps=2", "step_s=0.01", f"folder={place}", f"output={output}"])
        == 0
    )
    out = capsys.readouterr().out
    results = {result["name"]: result for result in json.loads(output.read_text())["results"]}
    names = ["none", "torch.save", "torch.save, fsync", "lctrain", "lctrain, asynchronous", "first asynchronous"]
    assert list(results) == names
    assert all(f"\n{name}" in out for name in names[:5])
    assert results["lctrain, asynchronous"]["waits_s"] < results["lctrain, asynchronous"]["done_s"]
    assert results["none"]["waits_s"] < 1e-3
    assert list(place.iterdir()) == []


def test_no_folder_and_no_room(tmp_path):
    with pytest.raises(UserError, match="is not a folder that can be written to"):
        main(["checkpoint", f"folder={tmp_path}/none"])
    with pytest.raises(UserError, match=r"GB free: mb=\d+ needs four times that"):
        main(["checkpoint", f"folder={tmp_path}", "mb=1000000000"])
