"""Pieces: chunks cut finer, so that where a window or a document border leaves part of a chunk dead, that part stays at home.

Schedules send a chunk whole or not at all. Under a window much shorter than a chunk, or with documents that end inside one,
most of what a chunk holds is of no use to its next rank. A placement with smaller chunks, owned by the same ranks in the same
order, needs no other change: schedules trim, the checker proves and costs count pieces as they do chunks, and kernels are
called as before, for neighbouring pieces arrive side by side and their bands join.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property

from lctrain.parallel.layout import Segment
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.placement import Placement

PIECES_OF_A_WINDOW = 4
"""A piece is at least such a part of the window: smaller ones would save less than an eighth of it, for more messages."""
SMALLEST = {"window": 64, "documents": 128}
"""Tokens: below this, messages are too small to be worth their latency."""
MOST = {"window": 16, "documents": 4}
"""Pieces of a chunk."""
MOST_IN_ALL = {"window": 256, "documents": 64}
"""Pieces of the sequence. Time to make a schedule grows with it, and packed documents ask for a new one in every batch."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A Placement whose chunks are those of another, each cut into `pieces` equal ones."""

    placement: Placement
    pieces: int

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.placement.world_size

    @property
    def chunks(self) -> int:
        """Pieces per rank."""
        return self.placement.chunks * self.pieces

    @property
    def chunk_length(self) -> int:
        """Tokens per piece."""
        return self.placement.chunk_length // self.pieces

    @property
    def local_length(self) -> int:
        """Tokens per rank."""
        return self.placement.local_length

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The pieces of a rank, in local order."""
        return self._segments[rank]

    @cached_property
    def _segments(self) -> tuple[tuple[Segment, ...], ...]:
        size = self.chunk_length
        return tuple(
            tuple(
                Segment(whole.start + first * whole.step, whole.step, size, whole.local + first)
                for whole in self.placement.segments(rank)
                for first in range(0, self.pieces * size, size)
            )
            for rank in range(self.world_size)
        )


def in_pieces(placement: Placement, mask: AttentionMask) -> Placement:
    """The placement that schedules are made for: the given one, or one with finer chunks where the mask makes that pay."""
    count = _count(placement, mask)
    return placement if count == 1 else Pieces(placement, count)


def _count(placement: Placement, mask: AttentionMask) -> int:
    strided = placement.segments(0)[0].step > 1  # every piece would see every other as much as the chunks do
    packed = any(len(borders) > 2 for borders in mask.documents)
    if placement.world_size == 1 or strided or (mask.window is None and not packed):
        return 1
    why = "documents" if mask.window is None else "window"
    smallest = max(SMALLEST[why], (mask.window or 0) // PIECES_OF_A_WINDOW)
    size = placement.chunk_length
    most = min(MOST[why], MOST_IN_ALL[why] // (placement.world_size * placement.chunks), size // smallest)
    return max((count for count in range(1, most + 1) if size % count == 0), default=1)
