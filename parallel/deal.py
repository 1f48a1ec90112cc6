"""Dealing: the `balanced` layout, in which every rank gets equal attention work whatever the documents.

The sequence is cut into equal blocks, the same number for every rank, and the blocks are dealt so that the live score entries
of each rank's queries are even. Few large blocks are best for kernels and messages, so the number is the smallest that is
even enough. One document is dealt as in the zigzag layout. Among deals that are equally even, blocks of one document stay on
as few ranks as possible, because a rank receives only the keys that its queries see.

A deal is a pure function of the documents' borders: ranks agree on it without a word.
"""

from __future__ import annotations

import numpy as np

from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.work import Documents, entries_before, first_keys

EVEN_ENOUGH = 1.05
"""Largest over mean work of a rank at which smaller blocks are not tried."""

BLOCKS_PER_RANK = (1, 2, 4, 8, 16)

SMALLEST_BLOCK = 128
"""Tokens: below this, attention kernels run in partly filled tiles, and messages grow small."""

_EVEN = 1.01
"""Largest over mean work at which no more blocks are exchanged: further ones would scatter documents for next to nothing."""

_SLACK = 0.05
"""A rank that has a block's keys already gets it even if it is ahead by this share of the mean work; exchanges make up for it.
On realistic documents this saves 3 to 35 % of the keys that ranks receive."""


def make_layout(kind: str, world_size: int, length: int, documents: Documents, window: int | None = None) -> SequenceLayout:
    """The layout of any kind for a batch; only "balanced" looks at `documents` and `window` (see balanced_layout)."""
    if kind == "balanced":
        return balanced_layout(world_size, length, documents, window)
    return SequenceLayout(kind, world_size, length)


def balanced_layout(
    world_size: int, length: int, documents: Documents, window: int | None = None, *, smallest_block: int = SMALLEST_BLOCK
) -> SequenceLayout:
    """Deal the blocks of a batch of packed sequences.

    Args:
        documents: per batch row, the document borders, as in AttentionMask; a row of padding alone may be (0,).
        window: tokens that a query sees, if all attention has this window; None where any layer sees its whole document.
        smallest_block: tokens; sequences that have not even two such blocks for every rank are cut into two all the same.
    """
    best, best_deal = np.inf, (0,) * world_size
    for blocks in BLOCKS_PER_RANK if world_size > 1 else (1,):
        count = world_size * blocks
        size = -(-length // count)
        if blocks > 2 and size < smallest_block:
            break
        cuts = np.minimum(np.arange(count + 1) * size, length)
        work = np.diff(entries_before(documents, cuts, window=window))
        if _lower_bound(work, world_size) >= best:
            continue
        owners = _deal(work, first_keys(documents, cuts[:-1], window=window) // size, world_size)
        uneven = _unevenness(np.bincount(owners, weights=work, minlength=world_size))
        if uneven < best:
            best, best_deal = uneven, tuple(owners.tolist())
        if best <= EVEN_ENOUGH:
            break
    return SequenceLayout("balanced", world_size, length, best_deal)


def _unevenness(loads: np.ndarray) -> float:
    return float(loads.max() * len(loads) / max(1, loads.sum()))


def _lower_bound(work: np.ndarray, world_size: int) -> float:
    """No deal is more even than this: the heaviest block comes with at least the lightest others."""
    others = len(work) // world_size - 1
    ordered = np.sort(work)
    return float((ordered[-1] + ordered[:others].sum()) * world_size / max(1, work.sum()))


def _deal(work: np.ndarray, first: np.ndarray, world_size: int) -> np.ndarray:
    """Owner of every block, int64; `first` is the first block whose keys a block needs."""
    if len(work) == world_size:
        return np.arange(world_size)
    owners = _longest_first(work, first, world_size)
    _even_out(work, owners, world_size)
    # Which rank is which matters only to rings: number them by their first block, so that neighbours share documents.
    order = np.argsort([np.argmax(owners == rank) for rank in range(world_size)])
    names = np.empty(world_size, dtype=np.int64)
    names[order] = np.arange(world_size)
    return names[owners]


def _longest_first(work: np.ndarray, first: np.ndarray, world_size: int) -> np.ndarray:
    """Heaviest block first, each to the least loaded rank with room, or to one not far ahead that has its keys already."""
    owners = np.empty(len(work), dtype=np.int64)
    has = np.zeros((len(work), world_size), dtype=bool)  # key block x rank
    loads = np.zeros(world_size)
    room = np.full(world_size, len(work) // world_size)
    slack = _SLACK * work.sum() / world_size
    for block in np.argsort(-work, kind="stable"):
        near = has[first[block]] & (loads <= loads.min() + slack)
        rank = int((np.where(near, loads, np.inf) if near.any() else loads).argmin())
        owners[block] = rank
        has[first[block] : block + 1, rank] = True
        room[rank] -= 1
        loads[rank] = loads[rank] + work[block] if room[rank] else np.inf
    return owners


def _even_out(work: np.ndarray, owners: np.ndarray, world_size: int) -> None:
    """Exchange a block of the busiest rank for another rank's while that makes the busier of the two less busy."""
    loads = np.bincount(owners, weights=work, minlength=world_size)
    for _ in range(4 * world_size):
        busiest = int(loads.argmax())
        if loads[busiest] <= _EVEN * loads.mean():
            return
        mine, theirs = np.flatnonzero(owners == busiest), np.flatnonzero(owners != busiest)
        moved = work[mine][:, None] - work[theirs]
        after = np.maximum(loads[busiest] - moved, loads[owners[theirs]] + moved)
        give, take = np.unravel_index(after.argmin(), after.shape)
        if after[give, take] >= loads[busiest]:
            return
        other = owners[theirs[take]]
        loads[busiest] -= moved[give, take]
        loads[other] += moved[give, take]
        owners[mine[give]], owners[theirs[take]] = other, busiest
