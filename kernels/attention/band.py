"""Band: the one shape of attention block that every mask here reduces to.

A band is a rectangle of query rows and key columns in which row m sees column n if and only if lo <= n - m <= hi, with
indices counted in the caller's tensors (not from the rectangle's corner). hi=None leaves the right side open (no causal
limit), lo=None the left side (no window). Causal, full, windowed and document masks are all lists of disjoint bands.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """Rows [q0, q1) x columns [k0, k1), live where lo <= column - row <= hi."""

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int | None = None
    hi: int | None = None

    @property
    def entries(self) -> int:
        """Live score entries, exactly, in constant time."""
        if self.q1 <= self.q0 or self.k1 <= self.k0:
            return 0
        return max(0, self._count_up_to(self.hi) - (0 if self.lo is None else self._count_up_to(self.lo - 1)))

    @property
    def full(self) -> bool:
        """Whether every entry of the rectangle is live."""
        return self.lo is None and self.hi is None

    def _count_up_to(self, limit: int | None) -> int:
        rows, columns = self.q1 - self.q0, self.k1 - self.k0
        if limit is None:
            return rows * columns
        reach = limit + self.q0 - self.k0 + 1  # live columns of the first row, if the rectangle were unbounded
        return _ramp(reach, rows) - _ramp(reach - columns, rows)

    def moved(self, down: int, right: int) -> Band:
        """The same entries in tensors whose indices are larger by `down` rows and `right` columns."""
        lo, hi = (None if bound is None else bound + right - down for bound in (self.lo, self.hi))
        return Band(self.q0 + down, self.q1 + down, self.k0 + right, self.k1 + right, lo, hi)

    def trim(self) -> Band | None:
        """The smallest equal band: no dead border rows or columns, no bound that does not bind; None if nothing is live.

        In a trimmed band every row has a live entry, so no softmax over it is empty.
        """
        q0, q1, k0, k1, lo, hi = self
        if lo is not None and hi is not None and lo > hi:
            return None
        if hi is not None:
            q0, k1 = max(q0, k0 - hi), min(k1, q1 + hi)
        if lo is not None:
            q1, k0 = min(q1, k1 - lo), max(k0, q0 + lo)
        if hi is not None:  # again: the other bound may have moved the corner
            q0, k1 = max(q0, k0 - hi), min(k1, q1 + hi)
        if q1 <= q0 or k1 <= k0:
            return None
        if hi is not None and hi >= k1 - 1 - q0:
            hi = None
        if lo is not None and lo <= k0 - (q1 - 1):
            lo = None
        return Band(q0, q1, k0, k1, lo, hi)

    def live(self, device: torch.device | str = "cpu") -> Tensor:
        """Boolean [rows, columns], True where live."""
        offset = torch.arange(self.k0, self.k1, device=device) - torch.arange(self.q0, self.q1, device=device)[:, None]
        live = torch.ones_like(offset, dtype=torch.bool)
        if self.lo is not None:
            live &= offset >= self.lo
        if self.hi is not None:
            live &= offset <= self.hi
        return live


def _ramp(first: int, terms: int) -> int:
    """Sum of max(0, first + i) for i in [0, terms)."""
    last = first + terms - 1
    return _triangle(last) - _triangle(first - 1)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2 if n > 0 else 0


def join(one: Band, two: Band) -> Band | None:
    """One band with exactly the live entries of two disjoint ones, or None if no band has them."""
    lo, hi = _tighter(one.lo, two.lo, max), _tighter(one.hi, two.hi, min)
    hull = Band(min(one.q0, two.q0), max(one.q1, two.q1), min(one.k0, two.k0), max(one.k1, two.k1), lo, hi)
    if hull.entries != one.entries + two.entries:
        return None
    for part in (one, two):
        if part._replace(lo=lo, hi=hi).entries != part.entries:
            return None
    return hull


def join_all(bands: list[Band]) -> list[Band]:
    """Join pairs until no pair joins, always the first that does: fewer, larger kernel calls for the same entries.

    Args:
        bands: disjoint and trimmed. Two of them join only if they touch, so only those that do are compared.
    """
    joined = dict(enumerate(bands))
    edges = _Edges()
    for index, band in joined.items():
        edges.add(index, band)
    changed = list(joined)  # a heap: every other band joins none of those after it
    while changed:
        at = heapq.heappop(changed)
        if at not in joined:
            continue
        for other in sorted(index for index in edges.touching(joined[at]) if index > at):
            whole = join(joined[at], joined[other])
            if whole is None:
                continue
            edges.remove(at, joined[at])
            edges.remove(other, joined.pop(other))
            edges.add(at, whole)
            joined[at] = whole
            for index in {at, *edges.touching(whole)}:
                if index <= at:
                    heapq.heappush(changed, index)
            break
    return list(joined.values())


class _Edges:
    """Bands by their first and last rows and columns."""

    def __init__(self) -> None:
        self._at: dict[tuple[str, int], set[int]] = defaultdict(set)

    def add(self, index: int, band: Band) -> None:
        for name in ("q0", "q1", "k0", "k1"):
            self._at[name, getattr(band, name)].add(index)

    def remove(self, index: int, band: Band) -> None:
        for name in ("q0", "q1", "k0", "k1"):
            self._at[name, getattr(band, name)].discard(index)

    def touching(self, band: Band) -> set[int]:
        """Bands that begin where this one ends, or end where it begins."""
        sides = (("q0", band.q1), ("q1", band.q0), ("k0", band.k1), ("k1", band.k0))
        return set().union(*(self._at[side] for side in sides if side in self._at))


def _tighter(one: int | None, two: int | None, pick) -> int | None:
    return two if one is None else one if two is None else pick(one, two)
