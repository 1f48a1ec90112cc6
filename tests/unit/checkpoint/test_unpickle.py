"""Pickles of checkpoints are read; anything that could run code is refused by its name, and does not run."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from lctrain.checkpoint.store import CheckpointStore
from lctrain.checkpoint.tensors import Reader
from lctrain.checkpoint.unpickle import Record, load_pickle, load_torch
from lctrain.convert.dcp import DcpFolder
from lctrain.errors import UserError


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write(path: Path, value, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (os.mkdir, "posix.mkdir"), (eval, "builtins.eval"), (getattr, "builtins.getattr")],
)
def test_code_is_refused_by_name(tmp_path, function, name, protocol):
    mark = tmp_path / "ran"
    path = write(tmp_path / "evil", {"weights": [Evil(function, f"touch {mark}")]}, protocol)
    with pytest.raises(UserError, match=rf"evil is refused: its pickle asks for {name}"):
        load_pickle(path)
    torch.save({"weights": Evil(function, f"touch {mark}")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=rf"evil.pt is refused: its pickle asks for {name}"):
        load_torch(tmp_path / "evil.pt")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch", "UntypedStorage.from_file"),
        ("torch.hub", "load"),
        ("collections", "namedtuple"),
        ("lctrain.cli", "main"),
    ],
)
def test_what_is_near_the_allowed_is_not(tmp_path, module, name):
    data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    (tmp_path / "evil").write_bytes(data)
    with pytest.raises(UserError, match="is refused"):
        load_pickle(tmp_path / "evil")


def test_tensors_and_containers_are_read(tmp_path):
    value = {
        "a": torch.arange(6.0).view(2, 3).t(),
        "b": OrderedDict(x=torch.zeros(0, dtype=torch.bfloat16)),
        "c": [torch.nn.Parameter(torch.ones(2)), torch.Size([1, 2]), torch.float16, {1, 2}, None, (1.5, "text", b"bytes")],
    }
    torch.save(value, tmp_path / "good.pt")
    for mmap in (True, False):
        found = load_torch(tmp_path / "good.pt", mmap)
        assert torch.equal(found["a"], value["a"])
        assert found["b"]["x"].dtype is torch.bfloat16
        assert torch.equal(found["c"][0], torch.ones(2))
        assert found["c"][1:] == value["c"][1:]


def test_records_of_other_programs_have_no_code(tmp_path):
    found = load_pickle(write(tmp_path / "args", argparse.Namespace(tp=2)))
    assert isinstance(found, Record)
    assert found.tp == 2
    assert not isinstance(found, argparse.Namespace)


def test_old_formats_and_programs_are_refused(tmp_path):
    torch.save(torch.ones(1), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before torch 1\.6"):
        load_torch(tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(UserError, match="TorchScript"):
        load_torch(tmp_path / "script.pt")


def test_damage_is_one_line(tmp_path):
    (tmp_path / "bad").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(UserError, match=r"bad cannot be read: \w+"):
        load_pickle(tmp_path / "bad")


def test_checkpoints_of_runs_go_through_it(tmp_path):
    path = CheckpointStore(tmp_path, keep_last=1).save(1, {"model": {"w": torch.ones(2, 3)}}, {})
    assert list(Reader(path).read_metadata().state_dict_metadata) == ["model/w"]
    mark = tmp_path / "ran"
    write(path / ".metadata", Evil(os.system, f"touch {mark}"))
    for read in (lambda: Reader(path).read_metadata(), lambda: DcpFolder(path)):
        with pytest.raises(UserError, match=r"posix\.system"):
            read()
    write(path / ".metadata", {"no": "metadata"})
    with pytest.raises(UserError, match=r"is not of torch\.distributed\.checkpoint"):
        DcpFolder(path)
    assert not mark.exists()
