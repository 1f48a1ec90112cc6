"""Pieces of chunks: the same tokens, results and kernel calls; fewer bytes where a window or a border leaves parts dead."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lctrain.bench.attention_problem import Problem
from lctrain.bench.attention_rank import run_rank
from lctrain.bench.attention_results import errors, unsharded
from lctrain.bench.attention_sdpa import WholeSequence
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.cost import traffic
from lctrain.parallel.exchange import Grouped
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.pieces import Pieces, in_pieces
from lctrain.parallel.plan import make_plan
from lctrain.parallel.strategies import STRATEGIES
from lctrain.parallel.strategy import Strategy

HEADS, DIM = 2, 8
MASKS = {"window": ((0, 1024), 100), "documents": ((0, 300, 650, 1024), None), "both": ((0, 400, 1024), 200)}


@given(st.sampled_from(["contiguous", "zigzag", "striped"]), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_pieces_are_the_chunks_cut_up(kind: str, world_size: int, size: int, pieces: int) -> None:
    layout = SequenceLayout(kind, world_size, 2 * world_size * size * pieces)
    cut = Pieces(layout, pieces)
    assert (cut.chunks, cut.chunk_length) == (layout.chunks * pieces, layout.chunk_length // pieces)
    for rank in range(world_size):
        segments = cut.segments(rank)
        assert len(segments) == cut.chunks
        positions = [s.start + s.step * i for s in segments for i in range(s.tokens)]
        assert positions == layout.indices(rank).tolist()
        assert [s.local for s in segments] == [place * cut.chunk_length for place in range(cut.chunks)]


def test_only_where_it_pays() -> None:
    zigzag = SequenceLayout("zigzag", 4, 65536)  # chunks of 8,192
    assert in_pieces(zigzag, AttentionMask.dense(65536)) is zigzag
    assert in_pieces(zigzag, AttentionMask.dense(65536, window=4096)).chunk_length == 1024
    assert in_pieces(zigzag, AttentionMask.dense(65536, window=60000)) is zigzag
    assert in_pieces(zigzag, AttentionMask(((0, 100, 65536),))).chunk_length == 2048
    assert in_pieces(SequenceLayout("striped", 4, 65536), AttentionMask.dense(65536, window=4096)).chunks == 1
    assert in_pieces(SequenceLayout("zigzag", 4, 8 * 67), AttentionMask.dense(8 * 67, window=8)).chunk_length == 67
    everyone = Grouped(zigzag, ((0, 1, 2, 3),))
    assert in_pieces(everyone, AttentionMask.dense(65536, window=4096)) is everyone


@pytest.mark.parametrize(("layout_kind", "world_size", "kv_heads"), [("zigzag", 2, 2), ("contiguous", 4, 1)])
@pytest.mark.parametrize("name", MASKS)
def test_exact_and_as_many_bytes_as_scheduled(name: str, layout_kind: str, world_size: int, kv_heads: int) -> None:
    borders, window = MASKS[name]
    shape = AttentionShape(1, HEADS, kv_heads, DIM, torch.float32)
    problem = Problem(shape, borders[-1], borders, window, layout_kind, 0)
    layout, exact = problem.layout(world_size), WholeSequence(problem).exact()
    assert isinstance(in_pieces(layout, problem.mask), Pieces)
    for name_of_strategy in (*STRATEGIES, "usp"):
        strategy = Strategy(name_of_strategy, node=2)
        passes = run_ranks(run_rank, world_size, problem, strategy, True)
        assert max(errors(unsharded(layout, passes), exact).values()) < 2e-6, strategy
        for rank, found in enumerate(passes):
            for way in ("forward", "backward"):
                assert +found.sent[way] == +traffic(strategy, layout, problem.mask, shape, way, rank)


@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_a_window_sends_what_it_reaches(strategy: str) -> None:
    """Pieces of 64 under a window of 100: two of them from every rank to the next, out of chunks of 512."""
    layout, mask = SequenceLayout("contiguous", 4, 2048), AttentionMask.dense(2048, window=100)
    shape = AttentionShape(1, HEADS, 2, DIM, torch.float32)
    sent = [traffic(Strategy(strategy), layout, mask, shape, "forward", rank)["kv"] for rank in range(4)]
    assert sent == [2 * 64 * 2 * 2 * DIM * 4] * 3 + [0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_kernel_calls_are_those_of_whole_chunks(strategy: str, direction: str) -> None:
    """Pieces join again before the kernel: no more bands than there are pairs of chunks."""
    layout, mask = SequenceLayout("zigzag", 4, 2048), AttentionMask.dense(2048, window=400)
    for rank in range(4):
        plan = make_plan(strategy, layout, mask, rank, direction, 1, 2)
        assert plan.placement.chunks == 2 * 2
        for step in plan.steps:
            for work in step.work:
                assert len(work.bands) <= 4
                assert max(part.band.q1 - part.band.q0 for part in work.bands) > plan.placement.chunk_length // 2
