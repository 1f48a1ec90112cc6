"""Strategies: every schedule passes the checker, and sends no more than it must."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.parallel.checker import check
from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.schedule import Schedule, TileMap
from lctrain.parallel.strategies import STRATEGIES, Problem, default_node, make_schedule


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    world, length = draw(st.integers(1, 16)), draw(st.integers(1, 120))
    kind = draw(st.sampled_from((*KINDS, "balanced")))
    owners = tuple(draw(st.permutations(list(range(world)) * 3))) if kind == "balanced" else None
    ends = st.sets(st.integers(1, length), min_size=1, max_size=6)
    rows = tuple((0, *sorted(draw(ends))) for _ in range(draw(st.integers(1, 2))))
    mask = AttentionMask(rows, draw(st.booleans()), draw(st.none() | st.integers(1, length)))
    live = TileMap(SequenceLayout(kind, world, length, owners), mask)
    node = draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    return Problem(live, draw(st.sampled_from(("forward", "backward"))), draw(st.integers(1, 4)), node)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_passes_the_checker(strategy: str, problem: Problem) -> None:
    schedule = STRATEGIES[strategy](problem)
    check(schedule, problem.live)
    assert (schedule.strategy, schedule.direction, schedule.world_size) == (strategy, problem.direction, problem.world_size)
    if problem.world_size == 1:
        assert len(schedule.ranks[0]) == 1


def causal(world: int, direction: str, strategy: str, kv_heads: int = 4, layout: str = "zigzag", node: int = 1) -> Schedule:
    length = 16 * world
    live = TileMap(SequenceLayout(layout, world, length), AttentionMask.dense(length))
    return make_schedule(strategy, Problem(live, direction, kv_heads, node))


def sent(schedule: Schedule) -> Counter[str]:
    """Items of all ranks by kind, in units of all heads."""
    total: Counter[str] = Counter()
    for rank in range(schedule.world_size):
        for (kind, _), count in schedule.sends(rank).items():
            total[kind] += count
    return Counter({kind: count / schedule.slices for kind, count in total.items()})


@pytest.mark.parametrize("world", [2, 3, 4, 8, 16])
def test_ring_sends_a_quarter_less_than_the_published_one(world: int) -> None:
    """Published: N-1 hops of both chunks of every rank; here the second chunk stops where the ring wraps."""
    published = 2 * world * (world - 1)
    assert sent(causal(world, "forward", "ring")) == {"kv": 0.75 * published}
    assert sent(causal(world, "backward", "ring"))["kv"] == 0.75 * published


@pytest.mark.parametrize("strategy", ["ring", "double_ring", "all_gather", "bidirectional_ring"])
def test_every_copy_of_keys_is_one_that_its_receiver_needs(strategy: str) -> None:
    for world in (4, 6, 8):
        schedule = causal(world, "forward", strategy, node=default_node(world))
        received = sum(len(step.receives) for steps in schedule.ranks for step in steps) / schedule.slices
        assert received == 0.75 * 2 * world * (world - 1)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_ring_gradients_make_no_more_hops_than_their_keys(world: int) -> None:
    """They follow one step behind, and go straight home from the last stop: as many hops as stops, where others take N."""
    schedule = causal(world, "backward", "ring")
    for owner in range(world):
        for part in (0, 1):
            hops = Counter(
                t.item.kind for steps in schedule.ranks for s in steps for t in s.sends if t.item.chunk == (owner, part)
            )
            assert hops["dkv"] == hops["kv"] <= world - 1
    assert sent(schedule) == {"kv": 1.5 * world * (world - 1), "dkv": 1.5 * world * (world - 1)}


@pytest.mark.parametrize("world", [2, 4, 8])
def test_token_ring_sends_each_query_where_it_has_keys_and_one_result_back(world: int) -> None:
    forward, backward = (sent(causal(world, way, "token_ring")) for way in ("forward", "backward"))
    assert forward == {"q": 1.5 * world * (world - 1), "out": 1.5 * world * (world - 1)}
    assert backward == {"q": 1.5 * world * (world - 1), "dq": 1.5 * world * (world - 1)}


def test_token_ring_returns_partial_results_straight_to_their_owner() -> None:
    for way, kind in (("forward", "out"), ("backward", "dq")):
        for steps in causal(8, way, "token_ring").ranks:
            assert all(t.peer == t.item.chunk.owner for step in steps for t in step.sends if t.item.kind == kind)


def test_bidirectional_ring_splits_the_heads_between_both_ways() -> None:
    """Everything goes from neighbour to neighbour, but upwards second chunks start beyond the wrap, where they are needed."""
    ways: Counter[int] = Counter()
    for rank, steps in enumerate(causal(8, "forward", "bidirectional_ring").ranks):
        for transfer in (t for step in steps for t in step.sends):
            ways[transfer.item.heads] += 1
            if transfer.item.heads == 0:
                assert (rank - transfer.peer) % 8 == 1
            elif transfer.item.chunk.part == 0 or rank != transfer.item.chunk.owner:
                assert (transfer.peer - rank) % 8 == 1
    assert ways[0] == ways[1]


@pytest.mark.parametrize("world", [3, 4, 8])
def test_ring_talks_to_one_neighbour_until_results_go_home(world: int) -> None:
    for rank, steps in enumerate(causal(world, "forward", "ring").ranks):
        assert {t.peer for step in steps for t in step.sends} <= {(rank - 1) % world}


def test_double_ring_gives_hops_between_nodes_a_whole_inner_round() -> None:
    schedule = causal(8, "forward", "double_ring", node=4)
    between = [t for rank, steps in enumerate(schedule.ranks) for s in steps for t in s.sends if t.peer // 4 != rank // 4]
    assert between
    for rank, steps in enumerate(schedule.ranks):
        for index, step in enumerate(steps):
            for transfer in step.sends:
                if transfer.peer // 4 != rank // 4:
                    assert transfer.until - index == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_window_trims_to_the_ranks_inside_it(strategy: str, direction: str) -> None:
    """Contiguous, 16 tokens per rank: a window of 17 reaches into the rank before, and not further."""
    live = TileMap(SequenceLayout("contiguous", 8, 128), AttentionMask.dense(128, window=17))
    schedule = make_schedule(strategy, Problem(live, direction, 4, 2))
    assert any(step.sends for steps in schedule.ranks for step in steps)
    for rank, steps in enumerate(schedule.ranks):
        for transfer in (t for step in steps for t in step.sends):
            assert abs(transfer.peer - rank) == 1
            assert {rank, transfer.peer} >= {transfer.item.chunk.owner}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_documents_inside_ranks_need_no_communication(strategy: str, direction: str) -> None:
    live = TileMap(SequenceLayout("contiguous", 4, 64), AttentionMask(((0, 16, 32, 40, 48, 64), (0, 5, 16, 32, 48))))
    schedule = make_schedule(strategy, Problem(live, direction, 4, 2))
    assert not any(step.sends or step.receives for steps in schedule.ranks for step in steps)


def test_refusals() -> None:
    live = TileMap(SequenceLayout("zigzag", 4, 64), AttentionMask.dense(64))
    with pytest.raises(ValueError, match="unknown attention strategy 'rnig': choose one of ring, "):
        make_schedule("rnig", Problem(live, "forward", 1))
    with pytest.raises(ValueError, match="4 ranks are not a multiple of 3 ranks per node"):
        make_schedule("double_ring", Problem(live, "forward", 1, 3))


@pytest.mark.parametrize(("world", "node"), [(1, 1), (2, 1), (4, 2), (6, 2), (7, 1), (8, 2), (12, 3), (16, 4)])
def test_default_node(world: int, node: int) -> None:
    assert default_node(world) == node
