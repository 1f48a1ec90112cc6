"""Folders of torch.distributed.checkpoint, written block by block: what megatron-core's `dist_checkpointing.load` reads."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from lctrain.convert.archive import bytes_of, save_without_numbers, write_at
from lctrain.convert.stream import Info

CHUNK_BYTES = 64 * 2**20


class Slot(NamedTuple):
    """Where a tensor belongs: into `row` of the tensor `key`, which has `rows` such (None: it is all of it)."""

    key: str
    row: int | None = None
    rows: int = 1


class _Hole(NamedTuple):
    """Bytes of a file that are still to be written."""

    file: IO[bytes]
    at: int
    bytes: int


class DcpWriter:
    """A Target. slots: of every tensor, one or several, of which each gets a copy. extra: further keys without a tensor.

    About every CHUNK_BYTES become a chunk, so that whoever reads them need not hold a whole tensor. The archives of a tensor's
    chunks are written first, without their numbers, and then filled as these arrive.
    """

    def __init__(
        self, folder: Path, infos: Mapping[str, Info], slots: Mapping[str, list[Slot]], extra: Iterable[str], file_bytes: int
    ) -> None:
        self._folder, self._infos, self._slots, self._limit = folder, infos, slots, file_bytes
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._files: list[IO[bytes]] = []
        for key in extra:
            self._tensors[key] = BytesStorageMetadata()
            file = self._current()
            start = file.tell()
            torch.save([None], file)
            self._place(MetadataIndex(key), start)

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """See Target."""
        copies = [iter(self._holes(self._infos[name], slot)) for slot in self._slots[name]]
        holes = [next(copy) for copy in copies]
        written = 0
        for block in blocks:
            data = bytes_of(block)
            written += len(data)
            while len(data):
                if not holes[0].bytes:
                    holes = [next(copy) for copy in copies]
                part = data[: holes[0].bytes]
                for hole in holes:
                    write_at(hole.file.fileno(), part, hole.at)
                holes = [_Hole(hole.file, hole.at + len(part), hole.bytes - len(part)) for hole in holes]
                data = data[len(part) :]
        assert written == self._infos[name].bytes, (name, written)

    def close(self) -> None:
        """See Target."""
        for file in self._files:
            os.fsync(file.fileno())
            file.close()
        metadata = Metadata(self._tensors, storage_data=self._places, storage_meta=StorageMeta())
        with open(self._folder / ".metadata", "wb") as file:
            pickle.dump(metadata, file)

    def _holes(self, info: Info, slot: Slot) -> list[_Hole]:
        """The chunks of a tensor, row after row."""
        shape = info.shape if slot.row is None else torch.Size((slot.rows, *info.shape))
        entry = self._tensors.setdefault(slot.key, TensorStorageMetadata(TensorProperties(dtype=info.dtype), shape, []))
        assert isinstance(entry, TensorStorageMetadata), slot
        step = max(1, CHUNK_BYTES * info.shape[0] // max(1, info.bytes))
        found = []
        for at in range(0, info.shape[0], step):
            sizes, offsets = [min(step, info.shape[0] - at), *info.shape[1:]], [at, *[0] * (len(info.shape) - 1)]
            if slot.row is not None:
                sizes, offsets = [1, *sizes], [slot.row, *offsets]
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            empty = torch.empty(sizes, dtype=info.dtype)  # its memory is never touched
            file = self._current()
            start = file.tell()
            found.append(_Hole(file, save_without_numbers(empty, file), empty.nbytes))
            self._place(MetadataIndex(slot.key, torch.Size(offsets)), start)
        return found

    def _current(self) -> IO[bytes]:
        if not self._files or self._files[-1].tell() > self._limit:
            self._files.append(open(self._folder / f"__0_{len(self._files)}.distcp", "x+b", buffering=0))  # noqa: SIM115
        return self._files[-1]

    def _place(self, index: MetadataIndex, start: int) -> None:
        path = f"__0_{len(self._files) - 1}.distcp"
        self._places[index] = _StorageInfo(path, start, self._files[-1].tell() - start)
