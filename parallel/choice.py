"""Choice: the strategy with which one kind of attention layer is fastest on a cluster, by simulating all that make sense."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from lctrain.parallel.cost import traffic
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.schedule import Direction
from lctrain.parallel.simulator import Cluster, simulate
from lctrain.parallel.strategies import STRATEGIES
from lctrain.parallel.strategy import Strategy
from lctrain.parallel.topology import Topology

EQUAL = 0.01
"""Times that differ by no more than this count as equal: the simulator does not know better. Fewer bytes win then."""


class Candidate(NamedTuple):
    """A strategy with its simulated seconds a layer, and the most bytes that any rank sends, both directions together."""

    strategy: Strategy
    forward_s: float
    backward_s: float
    bytes: int

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


def candidates(world_size: int, n_heads: int, topology: Topology) -> list[Strategy]:
    """Every strategy with every degree that makes sense; two rings and the outer nesting only where there are several nodes."""
    nodes = -(-world_size // topology.ranks_per_node)
    rings = [name for name in STRATEGIES if name != "double_ring"]
    found = [Strategy(name) for name in rings]
    if nodes > 1 and world_size % topology.ranks_per_node == 0:
        found.append(Strategy("double_ring", node=topology.ranks_per_node))
    if world_size <= n_heads:
        found.append(Strategy("ulysses"))
    for size in (n for n in range(2, min(world_size, n_heads + 1)) if world_size % n == 0):
        for nesting in ("inner", "outer") if nodes > 1 else ("inner",):
            found += [Strategy("usp", size, ring, nesting) for ring in rings]
    return found


@lru_cache(maxsize=64)
def rank_strategies(
    layout: SequenceLayout, mask: AttentionMask, shape: AttentionShape, cluster: Cluster
) -> tuple[Candidate, ...]:
    """All candidates, the chosen one first: the fewest bytes among those within EQUAL of the fastest; then by time.

    A pure function: ranks that ask alike choose alike.
    """
    found = [
        _simulated(strategy, layout, mask, shape, cluster)
        for strategy in candidates(layout.world_size, shape.n_heads, cluster.topology)
    ]
    limit = (1 + EQUAL) * min(candidate.seconds for candidate in found)
    chosen = min((candidate for candidate in found if candidate.seconds <= limit), key=lambda candidate: candidate.bytes)
    return (chosen, *sorted((c for c in found if c is not chosen), key=lambda candidate: candidate.seconds))


def _simulated(
    strategy: Strategy, layout: SequenceLayout, mask: AttentionMask, shape: AttentionShape, cluster: Cluster
) -> Candidate:
    ways: tuple[Direction, Direction] = ("forward", "backward")
    forward, backward = (simulate(strategy, layout, mask, shape, way, cluster).seconds for way in ways)
    sent = [sum(traffic(strategy, layout, mask, shape, way, rank).total() for way in ways) for rank in range(layout.world_size)]
    return Candidate(strategy, forward, backward, max(sent))
