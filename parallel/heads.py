"""Splitting attention heads into slices that different ranks, or different directions of a ring, work on."""

from __future__ import annotations

import dataclasses
from functools import lru_cache


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """Slice i has the query heads q[i] = (first, end) and needs the key/value heads kv[i] = (first, end).

    Query heads are dealt completely and once; key/value heads that several slices need appear in each of them.
    """

    q: tuple[tuple[int, int], ...]
    kv: tuple[tuple[int, int], ...]
    group: int

    @property
    def slices(self) -> int:
        """Number of slices."""
        return len(self.q)

    def is_uniform(self, part: int) -> bool:
        """Whether the slice is grouped attention by itself: each of its KV heads serves equally many of its query heads."""
        (q0, q1), (k0, k1) = self.q[part], self.kv[part]
        if q1 == q0:
            return True
        even = tuple(head * (k1 - k0) // (q1 - q0) for head in range(q1 - q0))
        return (q1 - q0) % (k1 - k0) == 0 and self.kv_of_queries(part) == even

    def kv_of_queries(self, part: int) -> tuple[int, ...]:
        """For each query head of the slice, its KV head, counted within the slice."""
        (q0, q1), (k0, _) = self.q[part], self.kv[part]
        return tuple(head // self.group - k0 for head in range(q0, q1))


@lru_cache(maxsize=256)
def split_heads(n_heads: int, n_kv_heads: int, slices: int) -> HeadSplit:
    """As even as possible. Borders lie between KV heads while there are enough of them, so that none is needed twice; with
    fewer KV heads than slices, query heads are split and their KV head is replicated. Slices may be uneven, or empty."""
    group = n_heads // n_kv_heads
    if n_kv_heads >= slices:
        kv = tuple((n_kv_heads * i // slices, n_kv_heads * (i + 1) // slices) for i in range(slices))
        return HeadSplit(tuple((a * group, b * group) for a, b in kv), kv, group)
    q = tuple((n_heads * i // slices, n_heads * (i + 1) // slices) for i in range(slices))
    return HeadSplit(q, tuple((a // group, -(-b // group)) if b > a else (0, 0) for a, b in q), group)
