"""Strategy: which way of sequence-parallel attention, with its degrees."""

from __future__ import annotations

import dataclasses
import math

from lctrain.parallel.exchange import Grouped
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.strategies import STRATEGIES, default_node

NAMES = (*STRATEGIES, "ulysses", "usp")


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to compute attention over a sequence that is spread over ranks.

    name: one of NAMES. ulysses: all heads for sequence. usp: heads for sequence in groups of `ulysses` ranks, and `ring`
        between the groups (Fang and Zhao 2024).
    ulysses: ranks per group of usp; None: the largest proper divisor of the ranks that also divides the KV heads.
    ring: strategy between the groups of usp.
    nesting: inner: a group's ranks are neighbours (share a node); outer: they lie as far apart as possible.
    node: ranks per node for double_ring; None: the largest divisor up to the square root.
    """

    name: str = "ring"
    ulysses: int | None = None
    ring: str = "ring"
    nesting: str = "inner"
    node: int | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown attention strategy {self.name!r}: choose one of {', '.join(NAMES)}")
        if self.ring not in STRATEGIES:
            raise ValueError(f"unknown ring {self.ring!r} of usp: choose one of {', '.join(STRATEGIES)}")
        if self.nesting not in ("inner", "outer"):
            raise ValueError(f"nesting is inner or outer, not {self.nesting!r}")

    def group_size(self, world_size: int, n_kv_heads: int) -> int:
        """Ranks that exchange heads for sequence; 1 for the plain rings. ValueError if it does not divide the ranks."""
        if self.name == "ulysses":
            return world_size
        if self.name != "usp":
            return 1
        if self.ulysses is None:
            fits = [n for n in range(1, world_size) if world_size % n == 0 and n_kv_heads % n == 0]
            return max(fits, default=1)
        if world_size % self.ulysses:
            raise ValueError(f"usp: {world_size} ranks are not a multiple of ulysses={self.ulysses}")
        return self.ulysses

    def grouped(self, layout: SequenceLayout, n_kv_heads: int) -> Grouped:
        """The layout with each group of exchanging ranks seen as one."""
        size = self.group_size(layout.world_size, n_kv_heads)
        groups = layout.world_size // size
        if self.nesting == "inner":
            members = tuple(tuple(range(g * size, (g + 1) * size)) for g in range(groups))
        else:
            members = tuple(tuple(range(g, layout.world_size, groups)) for g in range(groups))
        return Grouped(layout, members)

    def schedule_name(self) -> str:
        """The strategy of the schedule that runs between groups (or between all ranks)."""
        return self.ring if self.name in ("usp", "ulysses") else self.name

    def node_size(self, world_size: int) -> int:
        """Ranks per node of a double ring over `world_size` ranks."""
        return math.gcd(self.node, world_size) if self.node else default_node(world_size)
