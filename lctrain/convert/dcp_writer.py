"""Folders of torch.distributed.checkpoint, written block by block: what megatron-core's `dist_checkpointing.load` reads."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

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

from lctrain.convert.stream import Info

CHUNK_BYTES = 64 * 2**20


class Slot(NamedTuple):
    """Where a tensor belongs: into `row` of the tensor `key`, which has `rows` such (None: it is all of it)."""

    key: str
    row: int | None = None
    rows: int = 1


class DcpWriter:
    """A Target. slots: of every tensor, one or several, of which each gets a copy. extra: further keys without a tensor.

    About every CHUNK_BYTES become a chunk, so that no tensor need be in memory as a whole.
    """

    def __init__(
        self, folder: Path, infos: Mapping[str, Info], slots: Mapping[str, list[Slot]], extra: Iterable[str], file_bytes: int
    ) -> None:
        self._folder, self._infos, self._slots, self._limit = folder, infos, slots, file_bytes
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._count, self._file = 0, self._begin(0)
        for key in extra:
            self._tensors[key] = BytesStorageMetadata()
            self._places[MetadataIndex(key)] = self._append([None])

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """See Target."""
        info = self._infos[name]
        at = 0
        for block in _gathered(blocks):
            for slot in self._slots[name]:
                shape = info.shape if slot.row is None else torch.Size((slot.rows, *info.shape))
                entry = self._tensors.get(slot.key)
                if entry is None:
                    entry = TensorStorageMetadata(TensorProperties(dtype=info.dtype), shape, [])
                    self._tensors[slot.key] = entry
                assert isinstance(entry, TensorStorageMetadata), slot
                rest = [0] * (len(info.shape) - 1)
                offsets = torch.Size([at, *rest] if slot.row is None else [slot.row, at, *rest])
                data = (block if slot.row is None else block.unsqueeze(0)).contiguous()
                entry.chunks.append(ChunkStorageMetadata(offsets, data.shape))
                self._places[MetadataIndex(slot.key, offsets)] = self._append(data)
            at += block.shape[0]
        assert at == info.shape[0], (name, at)

    def close(self) -> None:
        """See Target."""
        os.fsync(self._file.fileno())
        self._file.close()
        metadata = Metadata(self._tensors, storage_data=self._places, storage_meta=StorageMeta())
        with open(self._folder / ".metadata", "wb") as file:
            pickle.dump(metadata, file)

    def _append(self, value: Any) -> _StorageInfo:
        if self._file.tell() > self._limit:
            os.fsync(self._file.fileno())
            self._file.close()
            self._count += 1
            self._file = self._begin(self._count)
        start = self._file.tell()
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # nobody compares them, and they take most of the time
        try:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                value = value.clone()  # else all that it is a view of would come along
            torch.save(value, self._file)
        finally:
            torch.serialization.set_crc32_options(checksums)
        return _StorageInfo(f"__0_{self._count}.distcp", start, self._file.tell() - start)

    def _begin(self, number: int) -> IO[bytes]:
        return open(self._folder / f"__0_{number}.distcp", "wb")


def _gathered(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Blocks of rows joined to larger ones."""
    held: list[Tensor] = []
    for block in blocks:
        held.append(block)
        if sum(each.nbytes for each in held) >= CHUNK_BYTES:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)
