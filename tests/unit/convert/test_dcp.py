"""Folders of torch.distributed.checkpoint: ours are read by torch, torch's by us, whatever chunks they are cut into."""

from __future__ import annotations

import itertools
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lctrain.convert import dcp_writer
from lctrain.convert.dcp import DcpFolder
from lctrain.convert.dcp_writer import DcpWriter, Slot
from lctrain.convert.stream import Info
from lctrain.errors import UserError


def cut(size: int, cuts: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(each % size for each in cuts)})
    return list(itertools.pairwise(edges))


def write_chunks(folder: Path, x: torch.Tensor, cuts: list[list[int]], strided: bool) -> None:
    """A tensor cut along each dimension, as a grid of ranks leaves it."""
    chunks, places = [], {}
    boxes: list[list[tuple[int, int]]] = [[]]
    for size, some in zip(x.shape, cuts, strict=False):
        boxes = [[*box, edge] for box in boxes for edge in cut(size, some)]
    with open(folder / "__0_0.distcp", "wb") as file:
        for box in boxes:
            part = x[tuple(slice(*edge) for edge in box)]
            part = part.t().contiguous().t() if strided and part.dim() == 2 else part.clone().contiguous()
            offsets, start = torch.Size(edge[0] for edge in box), file.tell()
            torch.save(part, file)
            chunks.append(ChunkStorageMetadata(offsets, part.shape))
            places[MetadataIndex("x", offsets)] = _StorageInfo("__0_0.distcp", start, file.tell() - start)
    entry = TensorStorageMetadata(TensorProperties(dtype=x.dtype), x.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"x": entry}, storage_data=places)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=4),
    st.lists(st.lists(st.integers(0, 4), max_size=2), min_size=4, max_size=4),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_any_chunks(tmp_path_factory, shape, cuts, strided, dtype, some):
    folder = tmp_path_factory.mktemp("chunks")
    x = torch.randn(shape).to(dtype)
    write_chunks(folder, x, cuts, strided)
    source = DcpFolder(folder)
    info = source.infos["x"]
    assert info == Info(x.shape, dtype)
    assert torch.equal(source.read("x"), x)
    lines = slice(min(some), max(some))
    first, last = info.span(lines)
    assert torch.equal(source.read("x", lines), info.shaped(x.reshape(info.lines, info.width)[first:last], lines))


@pytest.mark.parametrize("chunk_bytes", [1, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_reads_ours(tmp_path, monkeypatch, chunk_bytes, dtype):
    monkeypatch.setattr(dcp_writer, "CHUNK_BYTES", chunk_bytes)
    tensors = {"a": torch.randn(7, 5), "b.0": torch.randn(3, 2, 4), "b.1": torch.randn(3, 2, 4), "norm": torch.randn(6)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    infos = {name: Info(x.shape, x.dtype) for name, x in tensors.items()}
    slots = {"a": [Slot("a")], "b.0": [Slot("b", 0, 2)], "b.1": [Slot("b", 1, 2)], "norm": [Slot("norm"), Slot("alias")]}
    writer = DcpWriter(tmp_path, infos, slots, ["extra"], 300)
    for name, x in tensors.items():
        writer.write(name, x.reshape(-1, x.shape[-1]).split(2) if x.dim() > 1 else x.split(4))
    writer.close()
    wanted = {"a": tensors["a"], "b": torch.stack([tensors["b.0"], tensors["b.1"]]), "norm": tensors["norm"]}
    wanted["alias"] = wanted["norm"]
    found = {name: torch.zeros_like(x) for name, x in wanted.items()}
    with warnings.catch_warnings(action="ignore"):  # that there is no process group
        dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    ours = DcpFolder(tmp_path)
    for name, x in wanted.items():
        assert torch.equal(found[name], x), name
        assert torch.equal(ours.read(name), x), name
    assert len(list(tmp_path.glob("*.distcp"))) > 1


def test_what_is_damaged_is_told(tmp_path):
    x = torch.randn(40, 8)
    write_chunks(tmp_path, x, [[20], []], False)
    path = tmp_path / "__0_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 700])  # within the second chunk
    assert torch.equal(DcpFolder(tmp_path).read("x", slice(0, 20)), x[:20])
    with pytest.raises(UserError, match="is damaged at x"):
        DcpFolder(tmp_path).read("x")
    path.write_bytes(whole[:10])  # before the second chunk
    with pytest.raises(UserError, match=r"is damaged at x: .*[a-z]"):
        DcpFolder(tmp_path).read("x", slice(20, 40))
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        DcpFolder(tmp_path).read("x")


def test_a_missing_chunk_is_told(tmp_path):
    write_chunks(tmp_path, torch.randn(4, 3), [[2], []], False)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["x"].chunks.pop()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert DcpFolder(tmp_path).read("x", slice(0, 2)).shape == (2, 3)
    with pytest.raises(UserError, match="x lacks 6 numbers"):
        DcpFolder(tmp_path).read("x")
