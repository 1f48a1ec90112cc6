"""AttentionMask: which positions of a packed sequence may see which, and what that means for any two shards.

Every rule (causal or full, sliding window, document borders, padding) reduces to a short list of disjoint bands in the local
indices of two shards, because within one segment positions rise in equal steps: position a + s*m sees c + s*n if and only if
n - m lies in an interval. No strategy has to know any mask.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain.kernels.attention.band import Band, join_all
from lctrain.parallel.layout import Segment, SequenceLayout
from lctrain.parallel.placement import Placement

Borders = tuple[int, ...]


class RowBand(NamedTuple):
    """A band that holds for the batch rows [row0, row1); row1=None means up to the last."""

    row0: int
    row1: int | None
    band: Band


@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Who sees whom in a batch of packed sequences.

    documents: per batch row, the borders 0 = c0 < c1 < ... of its documents in global positions; positions from the last
        border on are padding, which sees nothing and is seen by nothing. One row alone stands for every row of the batch.
    causal: a position sees itself and earlier ones; otherwise later ones too.
    window: a position sees only those less than this many positions away (so itself and window - 1 before it); None: all.
    """

    documents: tuple[Borders, ...]
    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"an attention window holds at least the token itself, got window={self.window}")
        if not self.documents:
            raise ValueError("an attention mask needs the document borders of at least one row; (0, length) is one document")
        for borders in self.documents:
            if len(borders) < 2 or borders[0] != 0 or any(a >= b for a, b in itertools.pairwise(borders)):
                raise ValueError(f"document borders must rise from 0 to the end of the last document, got {borders}")

    @classmethod
    def dense(cls, length: int, causal: bool = True, window: int | None = None) -> AttentionMask:
        """One document of `length` tokens in every row."""
        return cls(((0, length),), causal, window)

    def bands(
        self, layout: Placement, queries: tuple[int, Iterable[int]], keys: tuple[int, Iterable[int]]
    ) -> tuple[RowBand, ...]:
        """Live entries between two shards, as disjoint trimmed bands in the shards' local indices.

        Args:
            queries, keys: (rank, chunks of that rank).
        """
        return _bands(self, layout, (queries[0], tuple(queries[1])), (keys[0], tuple(keys[1])))

    def entries(self, layout: Placement, queries: tuple[int, Iterable[int]], keys: tuple[int, Iterable[int]]) -> int:
        """Number of live score entries between two shards, per head, summed over the rows described by `documents`."""
        rows = len(self.documents)
        return sum(((part.row1 or rows) - part.row0) * part.band.entries for part in self.bands(layout, queries, keys))

    def total_entries(self, length: int) -> int:
        """Live score entries of the whole sequence of `length` tokens, per head, summed over rows."""
        return self.entries(SequenceLayout("contiguous", 1, length), (0, (0,)), (0, (0,)))

    def live(self, length: int) -> Tensor:
        """Boolean [rows, length, length]: the mask written out, for oracles and small sizes."""
        offset = torch.arange(length) - torch.arange(length)[:, None]
        allowed = offset <= 0 if self.causal else torch.ones_like(offset, dtype=torch.bool)
        if self.window is not None:
            allowed = allowed & (offset.abs() < self.window)
        rows = []
        for borders in self.documents:
            same = torch.zeros_like(allowed)
            for start, end in itertools.pairwise(borders):
                same[start:end, start:end] = True
            rows.append(allowed & same)
        return torch.stack(rows)


@lru_cache(maxsize=1024)
def _bands(
    mask: AttentionMask, layout: Placement, queries: tuple[int, tuple[int, ...]], keys: tuple[int, tuple[int, ...]]
) -> tuple[RowBand, ...]:
    found: list[RowBand] = []
    rows = mask.documents
    row = 0
    while row < len(rows):
        same = row + 1
        while same < len(rows) and rows[same] == rows[row]:
            same += 1
        for start, end in itertools.pairwise(rows[row]):
            mine, theirs = _runs(layout, queries, start, end), _runs(layout, keys, start, end)
            bands = [band for q in mine for k in theirs if (band := _between(mask, q, k))]
            found += [RowBand(row, same if len(rows) > 1 else None, band) for band in join_all(bands)]
        row = same
    return tuple(found)


def _runs(layout: Placement, side: tuple[int, tuple[int, ...]], start: int, end: int) -> list[Segment]:
    """Some chunks of a rank as far as they lie in positions [start, end); chunks that continue each other are one."""
    segments = layout.segments(side[0])
    runs: list[Segment] = []
    for part in (part for chunk in side[1] for part in _within(segments[chunk], start, end)):
        last = runs[-1] if runs else None
        if last and (part.start, part.local) == (last.start + last.step * last.tokens, last.local + last.tokens):
            runs[-1] = last._replace(tokens=last.tokens + part.tokens)
        else:
            runs.append(part)
    return runs


def _within(segment: Segment, start: int, end: int) -> list[Segment]:
    """The part of a segment that lies in positions [start, end): none or one."""
    first = max(0, -(-(start - segment.start) // segment.step))
    last = min(segment.tokens, -(-(end - segment.start) // segment.step))
    if first >= last:
        return []
    return [Segment(segment.start + first * segment.step, segment.step, last - first, segment.local + first)]


def _between(mask: AttentionMask, q: Segment, k: Segment) -> Band | None:
    assert q.step == k.step, "all segments of a layout have the same step"
    step, apart = q.step, q.start - k.start
    local = k.local - q.local  # turns n - m counted from the segments' starts into local column - local row
    lo = hi = None
    if mask.causal:
        hi = apart // step + local
    elif mask.window is not None:
        hi = -(-(apart + mask.window) // step) - 1 + local
    if mask.window is not None:
        lo = (apart - mask.window) // step + 1 + local
    return Band(q.local, q.local + q.tokens, k.local, k.local + k.tokens, lo, hi).trim()
