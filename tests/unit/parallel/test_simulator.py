"""The simulator: hand-computed timelines, and bounds that no timeline may break."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.parallel.cost import Call, CostedStep, Send, costed_steps
from lctrain.parallel.device import Device, Rates
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.simulator import Cluster, Simulation, exchanges, layer_seconds, simulate
from lctrain.parallel.strategy import NAMES, Strategy
from lctrain.parallel.topology import Link, Topology

FOREVER = 1e30
"""A bandwidth at which nothing takes time."""
WORK = CostedStep((), ())
SHAPE = AttentionShape(1, 4, 4, 16, torch.float32)


def flat(rate):
    return Rates((1,), (1,), ((rate,),))


def device(rate=1e9):
    return Device(flat(rate), flat(rate), flat(rate), flat(rate), call_s=0.0)


def one_node(bandwidth, latency=0.0, duplex="full", **more):
    return Topology(1000, Link(bandwidth, latency, duplex), Link(bandwidth, latency), **more)


def run(steps, seconds, topology):
    return Simulation(steps, seconds, topology).run()


def two_ranks(first, second):
    """Rank 0 sends `first` bytes and rank 1 sends `second`, both in step 0, needed at its end; then one more step each."""
    return [
        [CostedStep((), (Send("kv", 1, first, 0),) if first else ()), WORK],
        [CostedStep((), (Send("kv", 0, second, 0),) if second else ()), WORK],
    ]


def test_a_message_hidden_behind_work_costs_nothing():
    timeline = run(two_ranks(50, 0), [[1.0, 2.0], [1.0, 2.0]], one_node(100.0, latency=0.1))
    assert timeline.seconds == pytest.approx(3.0)
    (moved,) = timeline.moved
    assert (moved.posted, moved.start, moved.end) == pytest.approx((0.0, 0.1, 0.6))
    assert all(rank.compute == 3.0 and rank.exposed == 0.0 for rank in timeline.ranks())


def test_what_work_does_not_hide_is_exposed_on_both_sides():
    timeline = run(two_ranks(250, 0), [[1.0, 2.0], [1.0, 2.0]], one_node(100.0, latency=0.5))
    assert timeline.seconds == pytest.approx(5.0)
    assert [rank.exposed for rank in timeline.ranks()] == pytest.approx([2.0, 2.0])


def test_full_duplex_moves_both_ways_at_once_and_half_duplex_shares():
    steps, seconds = two_ranks(100, 100), [[0.0, 0.0]] * 2
    assert run(steps, seconds, one_node(100.0)).seconds == pytest.approx(1.0)
    assert run(steps, seconds, one_node(100.0, duplex="half")).seconds == pytest.approx(2.0)


def test_waiting_for_a_peer_that_is_not_ready_is_idleness_not_communication():
    steps = [[WORK, CostedStep((), (Send("kv", 1, 100, 1),))], [WORK, WORK]]
    timeline = run(steps, [[3.0, 0.0], [1.0, 0.0]], one_node(100.0))
    late, early = timeline.ranks()
    assert timeline.seconds == pytest.approx(4.0)
    assert (late.compute, late.exposed, late.idle) == pytest.approx((3.0, 1.0, 0.0))
    assert (early.compute, early.exposed, early.idle) == pytest.approx((1.0, 1.0, 2.0))


def test_ranks_of_a_node_share_its_network_card():
    steps = [[CostedStep((), (Send("kv", rank + 2, 100, 0),))] for rank in (0, 1)] + [[WORK], [WORK]]
    apart = Topology(2, Link(FOREVER, 0.0), Link(100.0, 0.0), cards=2)
    shared = dataclasses.replace(apart, cards=1)
    assert run(steps, [[0.0]] * 4, apart).seconds == pytest.approx(1.0)
    assert run(steps, [[0.0]] * 4, shared).seconds == pytest.approx(2.0)


def test_one_message_alone_may_get_less_than_the_port():
    steps = [[CostedStep((), (Send("q", 1, 100, 0), Send("kv", 2, 100, 0)))], [WORK], [WORK]]
    limited = Topology(8, Link(100.0, 0.0, alone=60.0), Link(1.0, 0.0))
    assert run(steps, [[0.0]] * 3, limited).seconds == pytest.approx(2.0)
    assert run([steps[0], [WORK], [WORK]], [[0.0]] * 3, one_node(100.0)).seconds == pytest.approx(2.0)
    alone = [[CostedStep((), (Send("q", 1, 120, 0),))], [WORK]]
    assert run(alone, [[0.0]] * 2, limited).seconds == pytest.approx(2.0)


def test_moving_bytes_takes_cores_from_computing_where_they_are_short():
    # 100 bytes at 0.01 core-seconds each end: 1 core-second at each; 1 s of work each; together 4 core-seconds on 2 cores.
    steps, seconds = [[CostedStep((), (Send("kv", 1, 100, 0),))], [WORK]], [[1.0], [1.0]]
    short = one_node(FOREVER, cpu_s_per_byte=0.01, cores=2.0)
    assert run(steps, seconds, short).seconds == pytest.approx(2.0)
    assert run(steps, seconds, dataclasses.replace(short, cores=4.0)).seconds == pytest.approx(1.0)


def test_every_tensor_stops_both_ends_and_every_pass_and_call_its_rank():
    layout, mask = SequenceLayout("contiguous", 2, 4), AttentionMask.dense(4)
    problem = Strategy("ring"), layout, mask, AttentionShape(1, 1, 1, 2, torch.float32), "backward"
    rates = [flat(FOREVER)] * 4
    steps = costed_steps(*problem)
    sends = [(rank, i, send.peer, send.tensors) for rank in (0, 1) for i, step in enumerate(steps[rank]) for send in step.sends]
    calls = [sum(len(step.calls) for step in rank) for rank in steps]
    ends = [sum(n for source, _, peer, n in sends if rank in (source, peer)) for rank in (0, 1)]
    assert sends == [(0, 0, 1, 1), (1, 2, 0, 1)]  # keys and values downwards, their gradients home
    costs = Device(*rates, call_s=1.0, pass_s=10.0, pass_s_per_byte=1000.0)
    host = one_node(FOREVER, cpu_s_per_message=100.0, cpu_s_per_exchange=1e5)
    timeline = simulate(*problem, Cluster("", costs, host))
    queries = 2 * 2 * 4  # tokens of a rank, head size, bytes
    # Each rank takes part in the exchange of the first step and in that of the second.
    expected = [count + 10.0 + 1000.0 * queries + 100.0 * end + 2e5 for count, end in zip(calls, ends, strict=True)]
    assert [rank.compute for rank in timeline.ranks()] == pytest.approx(expected)


def test_what_is_posted_together_for_one_step_is_one_exchange():
    together = (Send("q", 1, 8, 1, tensors=2), Send("kv", 1, 8, 1), Send("kv", 2, 8, 2))
    steps = [[CostedStep((), together), WORK, WORK], [WORK] * 3, [WORK] * 3]
    assert exchanges(steps) == {(0, 0, 1), (1, 0, 1), (0, 0, 2), (2, 0, 2)}


def test_zigzag_ring_of_two_by_hand():
    layout, mask = SequenceLayout("zigzag", 2, 8), AttentionMask.dense(8)
    shape = AttentionShape(1, 1, 1, 2, torch.float32)
    # 4 * 2 FLOP an entry. Rank 0 (blocks 0, 3): 3 + 3 + 4 = 10 own entries, then 2 x 4 of rank 1's first or both blocks.
    entries = [[sum(call.entries for call in step.calls) for step in rank] for rank in _steps("ring", layout, mask, shape)]
    assert entries == [[10, 8], [10, 8]]
    # Rank 0 sends its first block only (the second is dead for rank 1): 2 tokens x 2 x 2 x 4 bytes; rank 1 sends both.
    timeline = simulate(Strategy("ring"), layout, mask, shape, "forward", Cluster("", device(8.0), one_node(4.0)))
    assert [(m.source, m.bytes) for m in timeline.moved] == [(0, 32), (1, 64)]
    assert timeline.seconds == pytest.approx(64 / 4.0 + 8.0)


def _steps(name, layout, mask, shape, direction="forward"):
    return costed_steps(Strategy(name), layout, mask, shape, direction)


cases = st.tuples(
    st.sampled_from(NAMES),
    st.integers(1, 6),
    st.sampled_from(["contiguous", "zigzag", "striped"]),
    st.integers(1, 80),
    st.sampled_from([None, 1, 7, 30]),
    st.sampled_from(["forward", "backward"]),
    st.sampled_from([1, 2, 1000]),
)


def _of(case):
    name, world, kind, length, window, direction, per_node = case
    layout = SequenceLayout(kind, world, length)
    topology = Topology(per_node, Link(2e5, 1e-5), Link(5e4, 3e-5), cards=1)
    return (Strategy(name), layout, AttentionMask.dense(length, window=window), SHAPE, direction), topology


@settings(max_examples=60, deadline=None)
@given(cases)
def test_no_faster_than_the_busiest_rank_or_port_and_nothing_is_lost(case):
    problem, topology = _of(case)
    timeline = simulate(*problem, Cluster("", device(), topology))
    steps, world = costed_steps(*problem), problem[1].world_size
    work = [sum(device().seconds(call, problem[4], 16) for step in rank for call in step.calls) for rank in steps]
    assert timeline.seconds >= max(work) * (1 - 1e-9)
    ports: dict[tuple, float] = {}
    for moved in timeline.moved:
        assert moved.posted <= moved.start <= moved.end <= timeline.seconds * (1 + 1e-9)
        within = topology.node(moved.source) == topology.node(moved.target)
        for rank, way in ((moved.source, "out"), (moved.target, "in")):
            port = (rank, way) if within else ("card", topology.node(rank), way)
            ports[port] = ports.get(port, 0.0) + moved.bytes / (2e5 if within else 5e4)
    assert timeline.seconds >= max(ports.values(), default=0.0) * (1 - 1e-9)
    ends = [one.end for one in (*timeline.computed, *timeline.moved, *timeline.waited)]
    assert timeline.seconds == max(ends, default=0.0)
    sent = [sum(send.bytes for step in rank for send in step.sends) for rank in steps]
    assert sent == [sum(m.bytes for m in timeline.moved if m.source == rank) for rank in range(world)]
    for rank in timeline.ranks():
        assert rank.compute + rank.exposed + rank.idle == pytest.approx(timeline.seconds)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_without_communication_costs_only_the_critical_path_of_work_remains(case):
    problem, _ = _of(case)
    timeline = simulate(*problem, Cluster("", device(), one_node(FOREVER)))
    steps = costed_steps(*problem)
    ends = _lockstep([[sum(device().seconds(c, problem[4], 16) for c in s.calls) for s in rank] for rank in steps], steps)
    assert timeline.seconds == pytest.approx(max(ends), abs=1e-15)


def _lockstep(seconds, steps):
    """When each rank is done if messages arrive at once: a step ends when the peers due in it have entered the sending step."""
    world, begin, ends = len(steps), [0.0] * len(steps), [0.0] * len(steps)
    entered: dict[tuple[int, int], float] = {}
    due: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for rank, own in enumerate(steps):
        for index, step in enumerate(own):
            for send in step.sends:
                due.setdefault((rank, send.until), []).append((send.peer, index))
                due.setdefault((send.peer, send.until), []).append((rank, index))
    for index in range(max(map(len, steps))):
        entered.update({(rank, index): begin[rank] for rank in range(world)})
        ends = [
            max([begin[rank] + seconds[rank][index], *(entered[other] for other in due.get((rank, index), ()))])
            for rank in range(world)
        ]
        begin = ends
    return ends


@settings(max_examples=40, deadline=None)
@given(cases)
def test_twice_the_bandwidth_is_never_slower(case):
    problem, topology = _of(case)
    inside, between = (dataclasses.replace(link, bandwidth=2 * link.bandwidth) for link in (topology.inside, topology.between))
    faster = dataclasses.replace(topology, inside=inside, between=between)
    once, twice = (simulate(*problem, Cluster("", device(), t)).seconds for t in (topology, faster))
    assert twice <= once * (1 + 1e-9)


@pytest.mark.parametrize("name", ["ring", "all_gather"])
def test_alone_a_rank_only_computes(name):
    layout, mask = SequenceLayout("zigzag", 1, 64), AttentionMask.dense(64)
    seconds = layer_seconds(Strategy(name), layout, mask, SHAPE, Cluster("", device(), one_node(1.0)))
    assert seconds == pytest.approx((4 + 10) * 16 * 4 * mask.total_entries(64) / 1e9)


def test_without_work_only_messages_take_time():
    layout, mask = SequenceLayout("contiguous", 4, 64), AttentionMask.dense(64, causal=False)
    problem = Strategy("ring"), layout, mask, SHAPE, "forward"
    timeline = simulate(*problem, Cluster("", device(FOREVER), one_node(1e6, latency=1e-3)))
    hop = 16 * 2 * 4 * 16 * 4 / 1e6 + 1e-3  # tokens x (k, v) x heads x size x bytes
    assert timeline.seconds == pytest.approx(3 * hop)
    assert all(rank.exposed == pytest.approx(3 * hop) for rank in timeline.ranks())


def test_the_same_timeline_every_time():
    problem, topology = _of(("token_ring", 6, "zigzag", 80, 30, "backward", 2))
    one, two = (simulate(*problem, Cluster("", device(), topology)) for _ in range(2))
    assert one == two


def test_many_ranks_take_a_moment():
    layout, mask = SequenceLayout("contiguous", 64, 64 * 64), AttentionMask.dense(64 * 64)
    problem = Strategy("ring"), layout, mask, SHAPE, "forward"
    costed_steps(*problem)
    began = time.process_time()
    simulate(*problem, Cluster("", device(), Topology(8, Link(1e9, 1e-6), Link(1e8, 1e-6), cards=8)))
    assert time.process_time() - began < 3.0


def test_rates_are_interpolated_in_logarithms_and_flat_beyond_the_table():
    rates = Rates((256, 1024), (1, 4), ((10.0, 20.0), (30.0, 40.0)))
    assert rates.at(256, 1) == 10.0
    assert rates.at(512, 1) == pytest.approx(20.0)
    assert rates.at(512, 2) == pytest.approx(25.0)
    assert (rates.at(1, 1), rates.at(9999, 9999)) == (10.0, 40.0)


def test_bands_with_dead_corners_use_the_causal_table():
    mixed = Device(flat(8.0), flat(10.0), flat(4.0), flat(5.0), call_s=1.0)
    assert mixed.seconds(Call(4, 4, 16, 2), "forward", 1) == 1.0 + 4 * 16 * 2 / 8.0
    assert mixed.seconds(Call(4, 4, 10, 1), "backward", 1) == 1.0 + 10 * 10 / 5.0


@pytest.mark.parametrize(
    ("ranks_per_node", "cards", "step", "ranks", "own_cards", "bandwidth"),
    [
        (8, 8, 1, 8, 8, 50.0),
        (8, 8, 2, 4, 4, 50.0),  # each still has a card of its own
        (4, 2, 2, 2, 2, 25.0),  # shares it with the rank between
        (8, 2, 2, 4, 2, 25.0),
        (8, 8, 16, 1, 1, 50.0),
    ],
)
def test_one_rank_in_so_many_sees_fewer_ranks_on_a_node_and_its_part_of_the_cards(
    ranks_per_node, cards, step, ranks, own_cards, bandwidth
):
    whole = Topology(ranks_per_node, Link(450.0, 1e-6), Link(50.0, 1e-6), cards)
    seen = whole.every(step)
    assert (seen.ranks_per_node, seen.cards, seen.between.bandwidth) == (ranks, own_cards, bandwidth)
    assert seen.inside == whole.inside
