"""Files of the safetensors format, read and written piece by piece: no more than the tensor at hand is ever in memory.

8 bytes with the length of a JSON header; the header, name -> dtype, shape, place; the numbers. Read with plain reads, not
mapped into memory, because mapped pages of a large file count as resident.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from lctrain.convert.archive import bytes_of
from lctrain.convert.file_reader import FileReader
from lctrain.convert.stream import Info
from lctrain.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_HEADER_BYTES = 100_000_000
INDEX = "model.safetensors.index.json"


class SafetensorsFolder:
    """All tensors of a folder's safetensors files; a Source. UserError if there are none, or a file is damaged."""

    def __init__(self, folder: Path) -> None:
        self.infos: dict[str, Info] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._files = FileReader()
        for path in _files(folder):
            for name, (info, start) in _header(path).items():
                if name in self.infos:
                    raise UserError(f"{path} has {name}, and so has {self._places[name][0].name}: remove one of the files")
                self.infos[name], self._places[name] = info, (path, start)

    def read(self, name: str, lines: slice | None = None) -> Tensor:
        """See Source."""
        info, (path, start) = self.infos[name], self._places[name]
        first, last = info.span(lines)
        size = info.width * info.dtype.itemsize
        data = torch.empty((last - first) * size, dtype=torch.uint8)
        self._files.fill(data.numpy().data, path, start + first * size, name)
        return info.shaped(data.view(info.dtype), lines)


class SafetensorsWriter:
    """Writes tensors, in the order given, into files of about `shard_bytes`; a Target.

    One file is called model.safetensors; several are numbered and have an index, as transformers expects them.
    """

    def __init__(self, folder: Path, infos: Mapping[str, Info], shard_bytes: int, metadata: Mapping[str, str]) -> None:
        self._folder, self._infos, self._metadata = folder, infos, {"format": "pt", **metadata}
        self._shards = _shards(infos, shard_bytes)
        count = len(self._shards)
        self._names = (
            ["model.safetensors"] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        )
        self._waiting = [(shard, name) for shard, names in enumerate(self._shards) for name in names]
        self._current, self._file = -1, cast("IO[bytes] | None", None)

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """See Target."""
        shard, expected = self._waiting.pop(0)
        assert name == expected, (name, expected)
        if shard != self._current:
            self._begin(shard)
        assert self._file is not None
        written = 0
        for block in blocks:
            assert block.dtype == self._infos[name].dtype, (name, block.dtype)
            rest = bytes_of(block)
            written += len(rest)
            while len(rest):  # a single write ends at 2 GB
                rest = rest[self._file.write(rest) :]
        assert written == self._infos[name].bytes, (name, written)

    def close(self) -> None:
        """See Target."""
        assert not self._waiting, self._waiting[0]
        if self._current < 0:  # no tensors at all
            self._begin(0)
        self._end()
        if len(self._names) > 1:
            places = {name: self._names[shard] for shard, names in enumerate(self._shards) for name in names}
            total = sum(info.bytes for info in self._infos.values())
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=1)
            (self._folder / INDEX).write_text(text + "\n")

    def _begin(self, shard: int) -> None:
        self._end()
        header: dict[str, Any] = {"__metadata__": self._metadata}
        at = 0
        for name in self._shards[shard]:
            info = self._infos[name]
            header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [at, at + info.bytes]}
            at += info.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._current = shard
        self._file = open(self._folder / self._names[shard], "wb", buffering=0)  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _end(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def _shards(infos: Mapping[str, Info], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.bytes
    return shards


def _files(folder: Path) -> list[Path]:
    """The files that the index names, else all there are."""
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise UserError(f"{index} is damaged: it has no weight_map") from None
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{index} names {name}, which is not in the folder")
        return [folder / name for name in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{folder} has no *.safetensors")
    return found


def _header(path: Path) -> dict[str, tuple[Info, int]]:
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= MOST_HEADER_BYTES:
                raise ValueError("its header has no sensible length")
            content = json.loads(file.read(length))
            end = file.seek(0, os.SEEK_END)
        found = {}
        for name, entry in content.items():
            if name != "__metadata__":
                info = Info(torch.Size(entry["shape"]), DTYPES[entry["dtype"]])
                first, last = entry["data_offsets"]
                if first < 0 or last - first != info.bytes or 8 + length + last > end:
                    raise ValueError(f"{name} does not fit into it")
                found[name] = (info, 8 + length + first)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    return found
