"""Our reader and writer of safetensors against the library's, and what damaged files say."""

from __future__ import annotations

import json

import pytest
import torch

from lctrain.convert.safetensors import SafetensorsFolder, SafetensorsWriter
from lctrain.convert.stream import Info
from lctrain.errors import UserError

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "empty": torch.zeros(0, 4),
    "half": torch.arange(5).to(torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "bool": torch.tensor([True, False]),
}
INFOS = {name: Info(x.shape, x.dtype) for name, x in TENSORS.items()}


@pytest.mark.parametrize("shard_bytes", [10**9, 40])
def test_the_library_reads_ours(tmp_path, shard_bytes):
    library = pytest.importorskip("safetensors.torch")
    writer = SafetensorsWriter(tmp_path, INFOS, shard_bytes, {})
    for name, x in TENSORS.items():
        writer.write(name, iter(x.split(2)) if name == "a" else [x])
    writer.close()
    found = {name: x for path in tmp_path.glob("*.safetensors") for name, x in library.load_file(path).items()}
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], x) for name, x in TENSORS.items())
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_bytes == 40)
    ours = SafetensorsFolder(tmp_path)
    assert all(torch.equal(ours.read(name), x) for name, x in TENSORS.items())


def test_we_read_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    library.save_file(TENSORS, tmp_path / "model.safetensors")
    ours = SafetensorsFolder(tmp_path)
    assert ours.infos == INFOS or dict(ours.infos) == INFOS
    assert all(torch.equal(ours.read(name), x) for name, x in TENSORS.items())
    assert torch.equal(ours.read("a", slice(1, 3)), TENSORS["a"][1:3])
    assert ours.read("a", slice(1, 1)).shape == (0, 4)


def damaged(content: bytes):
    def write(folder):
        (folder / "model.safetensors").write_bytes(content)

    return write


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        (5).to_bytes(8, "little") + b"hello",
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),  # without the numbers
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + bytes(8),
        header(a={"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}) + bytes(8),
        header(a={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}) + bytes(8),
    ],
)
def test_damage_is_told(tmp_path, content):
    damaged(content)(tmp_path)
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        SafetensorsFolder(tmp_path)


def test_folders_without_the_files_that_they_name(tmp_path):
    with pytest.raises(UserError, match=r"has no \*\.safetensors"):
        SafetensorsFolder(tmp_path)
    for name in ("../outside.safetensors", "model-1.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="which is not in the folder"):
            SafetensorsFolder(tmp_path)
