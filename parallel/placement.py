"""Placement: where tokens live, as far as masks and schedules need to know."""

from __future__ import annotations

from typing import Protocol

from lctrain.parallel.layout import Segment


class Placement(Protocol):
    """Where tokens live: a SequenceLayout, or several ranks of one seen as a single rank."""

    @property
    def world_size(self) -> int:
        """Ranks."""

    @property
    def chunks(self) -> int:
        """Chunks per rank."""

    @property
    def chunk_length(self) -> int:
        """Tokens per chunk."""

    @property
    def local_length(self) -> int:
        """Tokens per rank."""

    def __hash__(self) -> int:
        """Placements are keys of caches."""

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The chunks of a rank, in local order."""
