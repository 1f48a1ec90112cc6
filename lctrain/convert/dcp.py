"""Folders of torch.distributed.checkpoint, read tensor by tensor without a process group, whatever layout wrote them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata

from lctrain.checkpoint.tensors import Reader
from lctrain.convert.stream import Info
from lctrain.errors import UserError


class DcpFolder:
    """A Source of the tensors whose names begin with `prefix`, under their names without it."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self._folder, self._prefix = folder, prefix
        metadata = Reader(folder).read_metadata()
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self.infos: dict[str, Info] = {}
        for name, entry in metadata.state_dict_metadata.items():
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
                self._chunks[name.removeprefix(prefix)] = entry.chunks
                self.infos[name.removeprefix(prefix)] = Info(entry.size, entry.properties.dtype)
        self._places: Mapping[tuple[str, tuple[int, ...]], Any] = {
            (index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()
        }
        self._last: tuple[str, Tensor] | None = None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """See Source. The tensor read last is kept, since rows of one are asked for in turn."""
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self.part(name, None))
        whole = self._last[1]
        return whole if rows is None else whole[rows]

    def part(self, name: str, row: int | None) -> Tensor:
        """A tensor, or one of its rows (of which other chunks are not read)."""
        info = self.infos[name]
        first, last = (0, info.shape[0] if info.shape else 1) if row is None else (row, row + 1)
        whole = torch.empty([last - first, *info.shape[1:]] if info.shape else [], dtype=info.dtype)
        filled = 0
        for chunk in self._chunks[name]:
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            if not info.shape:
                whole.copy_(self._load(name, ()).view([]))
                return whole
            low, high = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if low >= high:
                continue
            data = self._load(name, tuple(offsets))
            if list(data.shape) != sizes:
                data = data.view(sizes)
            at = [
                slice(low - first, high - first),
                *(slice(o, o + n) for o, n in itertools.islice(zip(offsets, sizes, strict=True), 1, None)),
            ]
            whole[tuple(at)] = data[low - offsets[0] : high - offsets[0]]
            filled += whole[tuple(at)].numel()
        if filled != whole.numel():
            raise UserError(
                f"checkpoint {self._folder} is not whole: {self._prefix}{name} lacks {whole.numel() - filled} numbers"
            )
        return whole if row is None else whole[0]

    def _load(self, name: str, offsets: tuple[int, ...]) -> Tensor:
        key = f"{self._prefix}{name}"
        place = self._places.get((key, offsets)) or self._places.get((key, ()))
        if place is None:
            raise UserError(f"checkpoint {self._folder} is not whole: part {list(offsets)} of {key} lies nowhere")
        path = self._folder / place.relative_path
        if Path(place.relative_path).name != place.relative_path:
            raise UserError(f"checkpoint {self._folder} is refused: it points at {place.relative_path}, outside of itself")
        try:
            with open(path, "rb") as file:
                file.seek(place.offset)
                data = torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except Exception as error:
            raise UserError(f"{path} is damaged at {key}: {' '.join(str(error).split())}") from None
        assert isinstance(data, Tensor), type(data)
        return data.detach()
