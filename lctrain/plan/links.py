"""How long collectives take on a cluster: bytes over the narrowest thing that they pass, and the latency of their hops.

A ring over several nodes enters and leaves each node once, on every card that its ranks there have between them, so its
bandwidth between nodes is the sum of those cards'. In an all-to-all every rank sends all but its own node's share by its own
part of a card.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from lctrain.config.cluster import ClusterConfig, LinkConfig
from lctrain.parallel.mesh import ProcessMesh
from lctrain.plan.cost import Sent


class Span(NamedTuple):
    """Where the ranks of a group are: how many, over how many nodes, and how many of them share a node at least."""

    ranks: int
    nodes: int
    on_node: int


@lru_cache(maxsize=1024)
def span(mesh: ProcessMesh, dimension: str, ranks_per_node: int) -> Span:
    """Of the groups along a dimension (or several, dp_cp) the one that is spread most."""
    spans = []
    for ranks in mesh.partition(*dimension.split("_")):
        nodes = Counter(rank // ranks_per_node for rank in ranks)
        spans.append(Span(len(ranks), len(nodes), min(nodes.values())))
    return max(spans, key=lambda found: (found.nodes, -found.on_node))


def sent_seconds(sent: Sent, mesh: ProcessMesh, cluster: ClusterConfig) -> float:
    """Seconds of all calls one after the other, nothing else using the links but the other ranks' part in the same."""
    where = span(mesh, sent.dimension, cluster.ranks_per_node)
    if where.ranks == 1 or not sent.calls:
        return 0.0
    collective = sent.collective != "exchange"
    inside, between = (_bandwidth(link, collective) for link in (cluster.inside, cluster.between))
    if where.nodes == 1:
        moving = sent.bytes / inside
    else:
        card = between * cluster.cards / cluster.ranks_per_node  # a rank's part of its node's cards
        if sent.collective == "exchange":
            moving = sent.bytes / card
        elif sent.collective == "all_to_all":
            near = (where.on_node - 1) / (where.ranks - 1)
            moving = max(sent.bytes * near / inside, sent.bytes * (1 - near) / card)
        else:
            moving = max(sent.bytes / inside if where.on_node > 1 else 0.0, sent.bytes / (card * where.on_node))
    latency = (cluster.inside if where.nodes == 1 else cluster.between).latency_us * 1e-6
    return max(moving, host_seconds(sent, cluster)) + sent.calls * _hops(sent.collective, where.ranks) * latency


def host_seconds(sent: Sent, cluster: ClusterConfig) -> float:
    """Core-seconds that a rank itself spends on what it sends and receives; none of them are free while it computes."""
    return 2 * sent.bytes * cluster.cpu_s_per_gb * 1e-9


def _bandwidth(link: LinkConfig, collective: bool) -> float:
    """Bytes/s that a rank sends while it receives as much."""
    port = link.gb_per_s * (0.5 if link.duplex == "half" else 1.0)
    most = link.collective_gb_per_s if collective else None
    return 1e9 * min(limit for limit in (port, link.message_gb_per_s, most) if limit is not None)


def _hops(collective: str, ranks: int) -> int:
    """Latencies one after the other: of a tree, there and back if something is added up for everybody."""
    tree = math.ceil(math.log2(ranks))
    return {"exchange": 1, "all_to_all": 1, "all_reduce": 2 * tree}.get(collective, tree)
