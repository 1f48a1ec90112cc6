"""What conversion reads from and writes to: named tensors, some lines at a time.

A line is what lies along the last dimension: a tensor [8, 4096, 1024] has 32768 lines of 1024 numbers. Of a tensor with one
dimension each number is a line, of one with none it is the only line.
"""

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

    @property
    def width(self) -> int:
        """Numbers of a line."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def lines(self) -> int:
        """How many lines it has."""
        return self.shape[:-1].numel() if len(self.shape) > 1 else self.shape.numel()

    def span(self, lines: slice | None) -> tuple[int, int]:
        """First line and the one after the last, of some lines or of all."""
        first, last, _ = (lines or slice(None)).indices(self.lines)
        return first, max(first, last)

    def shaped(self, flat: Tensor, lines: slice | None) -> Tensor:
        """The numbers of those lines as Source.read returns them."""
        if lines is None:
            return flat.reshape(self.shape)
        first, last = self.span(lines)
        return flat.reshape(last - first, self.width) if len(self.shape) > 1 else flat.reshape(-1)


class Source(Protocol):
    """Tensors that can be read."""

    @property
    def infos(self) -> Mapping[str, Info]:
        """What there is."""
        ...

    def read(self, name: str, lines: slice | None = None) -> Tensor:
        """A tensor, or some of its lines as [lines, width] (of one dimension: [lines]), on CPU."""
        ...


class Target(Protocol):
    """Takes tensors in the order in which it was told of them."""

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """A tensor as blocks of lines, one after the other."""
        ...

    def close(self) -> None:
        """Everything was written."""
        ...
