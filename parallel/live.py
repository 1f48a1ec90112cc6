"""Which chunks see which, for all pairs of a sharded sequence at once and without a look at every document for every pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lctrain.parallel.layout import Segment
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.work import first_keys


def live_pairs(segments: Sequence[Segment], mask: AttentionMask) -> np.ndarray:
    """Whether any query of one segment sees any key of another: bool [queries' segment, keys' segment].

    segments: disjoint runs of neighbouring positions; or, if they have a step, runs of which each takes all positions of the
        sequence that lie a multiple of the step apart. Equal to `bool(mask.bands(...))` for every pair.
    """
    starts, step = np.array([segment.start for segment in segments]), segments[0].step
    ends = starts + np.array([segment.tokens for segment in segments])
    live = _neighbouring(starts, ends, mask) if step == 1 else _strided(starts, step, mask)
    return live if mask.causal else live | live.T


def _neighbouring(starts: np.ndarray, ends: np.ndarray, mask: AttentionMask) -> np.ndarray:
    """Causal part: an earlier run is seen if it reaches the lowest key that the first query of a run sees."""
    reached = first_keys(mask.documents, starts, window=mask.window)
    longest = max(borders[-1] for borders in mask.documents)
    earlier = starts[None, :] < starts[:, None]
    return np.where(earlier, ends[None, :] > reached[:, None], np.diag(starts < longest))


def _strided(starts: np.ndarray, step: int, mask: AttentionMask) -> np.ndarray:
    """Causal part: queries lie (their start - the keys' start) mod step behind keys, or a multiple of step more.

    So some query sees a key if the first key of some document has that much of the document, and of the window, behind it.
    """
    room = np.zeros(len(starts), dtype=np.int64)
    for borders in mask.documents:
        begins = np.asarray(borders, dtype=np.int64)
        first = begins[:-1] + (starts[:, None] - begins[:-1]) % step
        room = np.maximum(room, (begins[1:] - first).max(axis=1))
    if mask.window is not None:
        room = np.minimum(room, mask.window)
    return (starts[:, None] - starts) % step < room
