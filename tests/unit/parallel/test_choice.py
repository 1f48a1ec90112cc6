"""Choosing a strategy by simulation: what is considered, what wins, and that nodes and windows matter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lctrain.attention_choice import preset
from lctrain.parallel.choice import EQUAL, candidates, rank_strategies
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape

H200 = preset("h200").build()
SHAPE = AttentionShape(1, 32, 8, 128, torch.bfloat16)


def ranked(world, length, shape=SHAPE, cluster=H200, window=None):
    layout = SequenceLayout("zigzag", world, length)
    return rank_strategies(layout, AttentionMask.dense(length, window=window), shape, cluster)


def test_on_one_node_neither_two_rings_nor_outer_groups_are_tried():
    one = candidates(8, 32, H200.topology)
    assert {s.name for s in one} == {"ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses", "usp"}
    assert {s.nesting for s in one} == {"inner"}
    assert {s.ulysses for s in one if s.name == "usp"} == {2, 4}
    two = candidates(16, 32, H200.topology)
    assert {s.node for s in two if s.name == "double_ring"} == {8}
    assert {s.nesting for s in two} == {"inner", "outer"}
    assert len(set(two)) == len(two)


def test_no_more_ranks_than_heads_exchange_heads():
    assert "ulysses" not in {s.name for s in candidates(8, 4, H200.topology)}
    assert {s.ulysses for s in candidates(8, 4, H200.topology) if s.name == "usp"} == {2, 4}


def test_the_chosen_one_is_within_the_limit_and_sends_least_of_those():
    found = ranked(4, 8192)
    fastest = min(candidate.seconds for candidate in found)
    assert found[0].seconds <= (1 + EQUAL) * fastest
    close = [candidate.bytes for candidate in found if candidate.seconds <= (1 + EQUAL) * fastest]
    assert found[0].bytes == min(close)
    assert [c.seconds for c in found[1:]] == sorted(c.seconds for c in found[1:])


def test_a_slow_network_moves_the_choice_towards_fewer_bytes():
    slow = dataclasses.replace(H200.topology.inside, bandwidth=1e9)
    crawling = dataclasses.replace(H200, topology=dataclasses.replace(H200.topology, inside=slow))
    found = ranked(4, 8192, cluster=crawling)
    assert found[0].bytes <= 1.1 * min(candidate.bytes for candidate in found)
    assert found[0].seconds > ranked(4, 8192)[0].seconds


def test_full_and_windowed_layers_may_differ():
    cluster = preset("a10_pcie").build()
    full, windowed = ranked(4, 8192, cluster=cluster), ranked(4, 8192, cluster=cluster, window=256)
    assert windowed[0].seconds < full[0].seconds
    assert windowed[0].strategy != full[0].strategy


def test_the_same_question_has_the_same_answer():
    first = ranked(4, 4096)
    rank_strategies.cache_clear()
    assert ranked(4, 4096) == first


@pytest.mark.parametrize("world", [1, 3, 7])
def test_odd_numbers_of_ranks(world):
    assert ranked(world, 1000)[0].seconds > 0
