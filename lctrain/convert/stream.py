"""What conversion reads from and writes to: named tensors, one at a time or a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Info(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of its numbers."""
        return self.shape.numel() * self.dtype.itemsize


class Source(Protocol):
    """Tensors that can be read."""

    @property
    def infos(self) -> Mapping[str, Info]:
        """What there is."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows (dimension 0), on CPU."""
        ...


class Target(Protocol):
    """Takes tensors in the order in which it was told of them."""

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """A tensor as blocks that lie row after row."""
        ...

    def close(self) -> None:
        """Everything was written."""
        ...
