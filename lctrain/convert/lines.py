"""Which lines of some tensors make up another one. A rule only moves lines, so it need not see the numbers: it is carried out
on the lines' numbers, and what comes out says where each line is to be read. Thus every rule works on blocks of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lctrain.convert.stream import Info, Source

BLOCK_BYTES = 2 * 2**20
"""Tensors are moved in blocks of about this size: small enough to stay in a core's cache between reading and writing, and in
memory that the allocator has at hand; twice as fast as blocks of 32 MiB."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a tensor is made of others. names: those. starts: of each, the number that its first line goes by.

    order: int64 [lines], whose number stands where. zeros: the number from which on lines are zeros.
    """

    names: Sequence[str]
    starts: Sequence[int]
    order: Tensor
    zeros: int

    def lengthened(self, lines: int) -> Recipe:
        """With zeros after its last line, up to so many lines."""
        more = self.zeros + torch.arange(lines - len(self.order))
        return dataclasses.replace(self, order=torch.cat([self.order, more])) if len(more) else self

    def blocks(self, source: Source, info: Info) -> Iterator[Tensor]:
        """The tensor in blocks of lines."""
        step = max(1, BLOCK_BYTES * info.lines // max(1, info.bytes))
        for first in range(0, info.lines, step):
            yield self.read(source, info, slice(first, first + step))

    def read(self, source: Source, info: Info, lines: slice | None) -> Tensor:
        """Some lines of it, or all, of the info's dtype."""
        first, last = info.span(lines)
        order = self.order[first:last]
        which = torch.bucketize(order, torch.tensor([*self.starts, self.zeros]), right=True) - 1
        parts = which.unique().tolist()
        if len(parts) == 1:
            return info.shaped(self._of_one(source, info, parts[0], order), lines)
        found = torch.empty(last - first, info.width, dtype=info.dtype)
        for part in parts:
            places = (which == part).nonzero().squeeze(1)
            found.index_copy_(0, places, self._of_one(source, info, part, order[places]))
        return info.shaped(found, lines)

    def _of_one(self, source: Source, info: Info, part: int, order: Tensor) -> Tensor:
        if part == len(self.names):
            return torch.zeros(len(order), info.width, dtype=info.dtype)
        return _read(source, self.names[part], order - self.starts[part], info.width).to(info.dtype)


def recipes(
    operation: Callable[[list[Tensor]], Sequence[Tensor]],
    names: Sequence[str],
    shapes: Sequence[torch.Size],
    inputs: Sequence[Info],
) -> list[Recipe]:
    """Of each tensor that an operation makes. shapes: of what it is given of each input, which may be the first rows only."""
    starts, at = [], 0
    for info in inputs:
        starts.append(at)
        at += info.lines + 1  # one that nothing has: the last line of one and the first of the next are no neighbours
    numbered = []
    for start, shape in zip(starts, shapes, strict=True):
        few = Info(shape, torch.int64)
        numbered.append((start + torch.arange(few.lines)).view(line_shape(shape)))
    return [Recipe(names, starts, part.reshape(-1), at) for part in operation(numbered)]


def line_shape(shape: torch.Size) -> torch.Size:
    """The shape of a tensor that has one number per line."""
    return torch.Size((*shape[:-1], 1)) if len(shape) > 1 else shape


def _read(source: Source, name: str, lines: Tensor, width: int) -> Tensor:
    """[lines, width] in this order."""
    low, high = int(lines.min()), int(lines.max()) + 1
    if high - low > 2 * len(lines):  # far apart: half of them at a time, rather than all that lies between
        middle = len(lines) // 2
        return torch.cat([_read(source, name, half, width) for half in (lines[:middle], lines[middle:])])
    found = source.read(name, slice(low, high)).reshape(high - low, width)
    return found if torch.equal(lines, torch.arange(low, high)) else found[lines - low]
