"""Topology: what messages between ranks go through, and what they cost. All times in seconds, all bandwidths in bytes/s."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lctrain.parallel.sharing import Resource

Duplex = Literal["full", "half"]


@dataclasses.dataclass(frozen=True)
class Link:
    """A port. full duplex: `bandwidth` each way at once; half: both ways share it. latency: both sides ready to first byte.

    alone: bandwidth that one message gets at most, however free the port; None: all of it.
    """

    bandwidth: float
    latency: float
    duplex: Duplex = "full"
    alone: float | None = None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Equal nodes, rank r on node r // ranks_per_node.

    inside: every rank's port to the ranks of its node, through a switch that is never the bottleneck.
    between: each of a node's `cards` network cards, which its ranks share out in order; the network behind is never the
        bottleneck.
    cpu_s_per_byte: core-seconds that each end of a message spends on a byte: one thread per rank does it, so messages of a
        rank go no faster than one core. 0 where copy engines and network cards do the work.
    cpu_s_per_message: seconds for which each end's computation stops to post a tensor and to wait for it, whatever its size.
    cpu_s_per_exchange: seconds for which a rank's computation stops for all that it posts together, however many tensors. Both
        are 0 where the host does that while the device computes.
    cores: cores of a node, which computing ranks and messages share; None: one for every rank of the node.
    """

    ranks_per_node: int
    inside: Link
    between: Link
    cards: int = 1
    cpu_s_per_byte: float = 0.0
    cores: float | None = None
    cpu_s_per_message: float = 0.0
    cpu_s_per_exchange: float = 0.0

    def node(self, rank: int) -> int:
        """Where a rank lives."""
        return rank // self.ranks_per_node

    def link(self, source: int, target: int) -> Link:
        """The kind of port that a message goes through."""
        return self.inside if self.node(source) == self.node(target) else self.between

    def card(self, rank: int) -> int:
        """The card of its node that a rank uses."""
        return rank % self.ranks_per_node * self.cards // self.ranks_per_node

    def every(self, step: int) -> Topology:
        """What one rank in `step` sees, those between doing the same at the same time, such as the other ranks of its matrices.

        A node then has ranks_per_node // step of such ranks (at least one), each with its own port inside; between nodes, each
        gets what one rank in `step` gets of the cards.
        """
        if step == 1:
            return self
        ranks = max(1, self.ranks_per_node // step)
        cards = min(self.cards, ranks)
        card = self.between.bandwidth * self.cards / self.ranks_per_node * ranks / cards
        between = dataclasses.replace(self.between, bandwidth=card)
        cores = None if self.cores is None else self.cores * ranks / self.ranks_per_node
        return dataclasses.replace(self, ranks_per_node=ranks, between=between, cards=cards, cores=cores)


class Machine:
    """A topology's resources for one simulation; messages and computations are told what they use."""

    def __init__(self, topology: Topology, world_size: int) -> None:
        self.topology = topology
        self._resources: dict[tuple[object, ...], Resource] = {}
        on_node = min(world_size, topology.ranks_per_node)
        self._cores = on_node if topology.cores is None else topology.cores

    def message(self, source: int, target: int) -> dict[Resource, float]:
        """Resources per byte sent from one rank to another."""
        link, cost = self.topology.link(source, target), self.topology.cpu_s_per_byte
        weights: dict[Resource, float] = {} if link.alone is None else {Resource(link.alone): 1.0}
        for rank, way in ((source, "out"), (target, "in")):
            port = (
                ("rank", rank) if link is self.topology.inside else ("node", self.topology.node(rank), self.topology.card(rank))
            )
            name = (*port, way) if link.duplex == "full" else port
            weights[self._resource(name, link.bandwidth)] = 1.0
            if cost:
                weights[self._resource(("mover", rank), 1.0)] = cost
                cores = self._node_cores(rank)
                weights[cores] = weights.get(cores, 0.0) + cost
        return weights

    def computation(self, rank: int) -> dict[Resource, float]:
        """Resources per second of computation alone on a core or device."""
        weights = {self._resource(("computer", rank), 1.0): 1.0}
        if self.topology.cpu_s_per_byte:
            weights[self._node_cores(rank)] = 1.0
        return weights

    def _node_cores(self, rank: int) -> Resource:
        return self._resource(("cores", self.topology.node(rank)), self._cores)

    def _resource(self, name: tuple[object, ...], capacity: float) -> Resource:
        return self._resources.setdefault(name, Resource(capacity))
