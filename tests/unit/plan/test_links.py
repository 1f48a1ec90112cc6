"""Collectives on links: bytes over the narrowest thing that they pass."""

from __future__ import annotations

import pytest

from lctrain.parallel.mesh import ProcessMesh
from lctrain.plan.cost import Sent
from lctrain.plan.links import Span, host_seconds, sent_seconds, span

GB = 1_000_000_000


def test_span_is_that_of_the_group_spread_most():
    mesh = ProcessMesh(0, dp=4, cp=2, tp=2)
    assert span(mesh, "tp", 4) == Span(2, 1, 2)
    assert span(mesh, "cp", 4) == Span(2, 1, 2)
    assert span(mesh, "dp", 4) == Span(4, 4, 1)
    assert span(mesh, "dp_cp", 4) == Span(8, 4, 2)
    assert span(ProcessMesh(0, cp=3, dp=2), "cp", 4) == Span(3, 2, 1)  # ranks 3, 4 and 5


@pytest.mark.parametrize(
    ("mesh", "sent", "seconds"),
    [
        (ProcessMesh(0, tp=4), Sent("tp", "all_gather", GB, 3), 0.01),
        (ProcessMesh(0), Sent("tp", "all_gather", GB, 3), 0.0),
        # every rank of a node is in the ring: both cards
        (ProcessMesh(0, dp=8), Sent("dp", "all_reduce", GB, 1), 1 / 20),
        # one rank of a node is: its half of a card
        (ProcessMesh(0, dp=2, tp=4), Sent("dp", "all_reduce", GB, 1), 1 / 5),
        (ProcessMesh(0, pp=2, tp=4), Sent("pp", "exchange", GB, 1), 1 / 5),
        # 4 of 7 others are on the other node
        (ProcessMesh(0, dp=8, ep=8), Sent("ep", "all_to_all", GB, 1), 4 / 7 / 5),
    ],
)
def test_seconds(cluster, mesh, sent, seconds):
    assert sent_seconds(sent, mesh, cluster) == pytest.approx(seconds)


def test_latency_half_duplex_collectives_and_hosts(cluster):
    mesh, sent = ProcessMesh(0, tp=4), Sent("tp", "all_reduce", GB, 10)

    def changed(**inside):
        return cluster.model_copy(update={"inside": cluster.inside.model_copy(update=inside)})

    assert sent_seconds(sent, mesh, changed(latency_us=100.0)) == pytest.approx(0.01 + 10 * 4 * 100e-6)
    assert sent_seconds(sent, mesh, changed(duplex="half")) == pytest.approx(0.02)
    assert sent_seconds(sent, mesh, changed(collective_gb_per_s=1.0)) == pytest.approx(1.0)
    assert sent_seconds(sent._replace(collective="exchange"), mesh, changed(collective_gb_per_s=1.0)) == pytest.approx(0.01)
    slow_host = cluster.model_copy(update={"cpu_s_per_gb": 0.3})
    assert host_seconds(sent, slow_host) == pytest.approx(0.6)
    assert sent_seconds(sent, mesh, slow_host) == pytest.approx(0.6)
