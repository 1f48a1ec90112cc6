"""Work: live score entries of many ranges of queries at once, in closed form.

AttentionMask.entries counts between any two shards. Here the keys are all that a query sees, so a query's entries depend on
nothing but its place in its document, and a range of positions costs two look-ups in a running sum, whatever its length.
Everything is exact (int64), per head, and summed over batch rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Documents = Sequence[Sequence[int]]


def entries_before(documents: Documents, cuts: np.ndarray, *, causal: bool = True, window: int | None = None) -> np.ndarray:
    """Live entries of all queries at positions below each of `cuts`: int64, one per cut.

    documents, causal, window: as in AttentionMask; a row that is all padding may also be given as (0,).
    """
    cuts = np.asarray(cuts, dtype=np.int64)
    total = np.zeros(len(cuts), dtype=np.int64)
    for borders in map(_array, documents):
        if len(borders) < 2:
            continue
        lengths = np.diff(borders)
        before = np.concatenate([[0], np.cumsum(_first_queries(lengths, lengths, causal, window))])
        inside = np.minimum(cuts, borders[-1])
        document = np.minimum(np.searchsorted(borders, inside, side="right") - 1, len(lengths) - 1)
        total += before[document] + _first_queries(inside - borders[document], lengths[document], causal, window)
    return total


def strided_entries(documents: Documents, step: int, *, causal: bool = True, window: int | None = None) -> np.ndarray:
    """Live entries of the queries at positions r, r + step, r + 2 step, ... for every r below `step`: int64 [step]."""
    total = np.zeros(step, dtype=np.int64)
    for borders in map(_array, documents):
        starts, lengths = borders[:-1], np.diff(borders)
        first = (np.arange(step)[:, None] - starts) % step  # place in its document of the first such query
        count = np.maximum(0, -(-(lengths - first) // step))
        entries = _capped_sum(first + 1, step, count, window)
        if not causal:
            entries += _capped_sum(lengths - first - step * (count - 1), step, count, window) - count
        total += entries.sum(axis=1)
    return total


def first_keys(documents: Documents, positions: np.ndarray, *, window: int | None = None) -> np.ndarray:
    """The lowest position that a causal query at each of `positions` sees in any row; its own where it is padding. int64."""
    positions = np.asarray(positions, dtype=np.int64)
    first = positions.copy()
    for borders in map(_array, documents):
        start = borders[np.searchsorted(borders, positions, side="right") - 1]
        if window is not None:
            start = np.maximum(start, positions - window + 1)
        first = np.where(positions < borders[-1], np.minimum(first, start), first)
    return first


def _array(borders: Sequence[int]) -> np.ndarray:
    return np.asarray(borders, dtype=np.int64)


def _first_queries(queries: np.ndarray, length: np.ndarray, causal: bool, window: int | None) -> np.ndarray:
    """Entries of the first `queries` queries of documents of `length` tokens: query i sees i+1 keys back, length-i ahead."""
    back = _capped_sum(1, 1, queries, window)
    if causal:
        return back
    ahead = _capped_sum(1, 1, length, window) - _capped_sum(1, 1, length - queries, window)
    return back + ahead - queries  # the query itself was counted on both sides


def _capped_sum(first: np.ndarray | int, step: int, count: np.ndarray, cap: int | None) -> np.ndarray:
    """Sum of min(first + step * i, cap) for i in [0, count)."""
    rising = count if cap is None else np.clip((cap - first) // step + 1, 0, count)
    total = rising * first + step * (rising * (rising - 1) // 2)
    return total if cap is None else total + (count - rising) * cap
