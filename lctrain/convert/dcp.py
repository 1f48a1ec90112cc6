"""Folders of torch.distributed.checkpoint, read by lines without a process group, whatever layout wrote them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from lctrain.checkpoint.tensors import Reader
from lctrain.convert.archive import bytes_of, stored_at, window
from lctrain.convert.file_reader import FileReader
from lctrain.convert.stream import Info
from lctrain.errors import UserError


class _Box(NamedTuple):
    """A chunk within its tensor: at these offsets, of these sizes. first, last: its first and last line of the tensor."""

    offsets: torch.Size
    info: Info
    first: int
    last: int


class _Stored(NamedTuple):
    """Where a chunk lies. numbers: where its numbers begin in the file; None if they are not one after the other."""

    path: Path
    start: int
    length: int
    numbers: int | None


class DcpFolder:
    """A Source of the tensors whose names begin with `prefix`, under their names without it."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self._folder, self._prefix = folder, prefix
        metadata = Reader(folder).read_metadata()
        self._boxes: dict[str, list[_Box]] = {}
        self.infos: dict[str, Info] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
                info = Info(entry.size, entry.properties.dtype)
                self.infos[key.removeprefix(prefix)] = info
                self._boxes[key.removeprefix(prefix)] = [_box(chunk, info) for chunk in entry.chunks]
        self._places: Mapping[tuple[str, tuple[int, ...]], Any] = {
            (index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()
        }
        self._files = FileReader()
        self._find = functools.lru_cache(maxsize=1024)(self._look_up)
        self._whole = functools.lru_cache(maxsize=1)(self._load_whole)

    def read(self, name: str, lines: slice | None = None) -> Tensor:
        """See Source."""
        info = self.infos[name]
        first, last = info.span(lines)
        found = torch.empty(last - first, info.width, dtype=info.dtype)
        filled = 0
        for box in self._boxes[name]:
            if box.first >= last or box.last < first or not box.info.lines:
                continue
            if box.last - box.first + 1 == box.info.lines:  # its lines are neighbours
                low, high = max(first, box.first), min(last, box.last + 1)
                rows: slice | Tensor = slice(low - first, high - first)
                inner = slice(low - box.first, high - box.first)
            else:
                numbers = _lines(box, info)
                inner = slice(*torch.searchsorted(numbers, torch.tensor([first, last])).tolist())
                rows = numbers[inner] - first
            column = box.offsets[-1] if len(info.shape) > 1 else 0
            part = self._load(name, box, inner, found, rows)
            if part is not None:
                found[rows, column : column + box.info.width] = part
            filled += (inner.stop - inner.start) * box.info.width
        if filled != found.numel():
            raise UserError(
                f"checkpoint {self._folder} is not whole: {self._prefix}{name} lacks {found.numel() - filled} numbers"
            )
        return info.shaped(found, lines)

    def _load(self, name: str, box: _Box, lines: slice, found: Tensor, rows: slice | Tensor) -> Tensor | None:
        """Those lines of a chunk; None if they were read to their place at once, since that is one stretch of memory."""
        stored = self._find(f"{self._prefix}{name}", box)
        if stored.numbers is None:
            return self._whole(stored).reshape(box.info.lines, box.info.width)[lines]
        at_once = isinstance(rows, slice) and box.info.width == found.shape[1]
        part = found[rows] if at_once else torch.empty(lines.stop - lines.start, box.info.width, dtype=found.dtype)
        start = stored.numbers + lines.start * box.info.width * found.itemsize
        self._files.fill(bytes_of(part), stored.path, start, f"{self._prefix}{name}")
        return None if at_once else part

    def _look_up(self, key: str, box: _Box) -> _Stored:
        place = self._places.get((key, tuple(box.offsets))) or self._places.get((key, ()))
        if place is None:
            raise UserError(f"checkpoint {self._folder} is not whole: part {list(box.offsets)} of {key} lies nowhere")
        path = self._folder / place.relative_path
        if Path(place.relative_path).name != place.relative_path:
            raise UserError(f"checkpoint {self._folder} is refused: it points at {place.relative_path}, outside of itself")
        try:
            descriptor = self._files.descriptor(path)
            tensor, start = stored_at(descriptor, place.offset, place.length)
            if tensor.numel() != box.info.shape.numel() or tensor.dtype != box.info.dtype:
                raise ValueError(f"it holds {list(tensor.shape)} {tensor.dtype}")
            numbers = start + int(tensor.storage_offset()) * tensor.itemsize if tensor.is_contiguous() else None
            return _Stored(path, place.offset, place.length, numbers)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except Exception as error:
            told = " ".join(str(error).split()) or "the file ends before it"
            raise UserError(f"{path} is damaged at {key}: {told}") from None

    def _load_whole(self, stored: _Stored) -> Tensor:
        file = window(self._files.descriptor(stored.path), stored.start, stored.length)
        found: Tensor = torch.load(file, map_location="cpu", weights_only=True)
        return found.detach().contiguous()


def _box(chunk: ChunkStorageMetadata, info: Info) -> _Box:
    outer = len(info.shape) - 1 if len(info.shape) > 1 else len(info.shape)
    first = last = 0
    for offset, size, whole in itertools.islice(zip(chunk.offsets, chunk.sizes, info.shape, strict=True), outer):
        first, last = first * whole + offset, last * whole + offset + size - 1
    return _Box(torch.Size(chunk.offsets), Info(torch.Size(chunk.sizes), info.dtype), first, last)


def _lines(box: _Box, info: Info) -> Tensor:
    """int64: which lines of the tensor a chunk of several dimensions has, rising."""
    numbers = torch.zeros(1, dtype=torch.int64)
    for offset, size, whole in list(zip(box.offsets, box.info.shape, info.shape, strict=True))[:-1]:
        numbers = (numbers[:, None] * whole + torch.arange(offset, offset + size)).flatten()
    return numbers
