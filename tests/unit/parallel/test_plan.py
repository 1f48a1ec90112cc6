"""AttentionPlan: the work of all ranks is the mask, once; copies are dropped after their last use."""

from __future__ import annotations

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.parallel import plan
from lctrain.parallel.exchange import Grouped
from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.plan import AttentionPlan, make_plan
from lctrain.parallel.schedule import COPIES, Item
from lctrain.parallel.strategies import STRATEGIES


@st.composite
def placements(draw: st.DrawFn) -> tuple[SequenceLayout | Grouped, AttentionMask]:
    length, groups, size = draw(st.integers(1, 80)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    layout = SequenceLayout(draw(st.sampled_from(KINDS)), groups * size, length)
    ends = st.sets(st.integers(1, length), min_size=1, max_size=4)
    rows = tuple((0, *sorted(draw(ends))) for _ in range(draw(st.integers(1, 2))))
    mask = AttentionMask(rows, draw(st.booleans()), draw(st.none() | st.integers(1, length)))
    if size == 1:
        return layout, mask
    return Grouped(layout, tuple((g, groups + g) for g in range(groups))), mask


def entries(plan: AttentionPlan, rows: int) -> int:
    """Live score entries of a plan's bands, summed over batch rows and slices of the heads."""
    return sum(((part.row1 or rows) - part.row0) * part.band.entries for s in plan.steps for w in s.work for part in w.bands)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@settings(max_examples=25, deadline=None)
@given(case=placements(), kv_heads=st.integers(1, 3))
def test_all_ranks_together_compute_the_mask(strategy: str, direction: str, case, kv_heads: int) -> None:
    placement, mask = case
    length = (placement.layout if isinstance(placement, Grouped) else placement).length
    plans = [make_plan(strategy, placement, mask, r, direction, kv_heads, 1) for r in range(placement.world_size)]
    total = sum(entries(plan, len(mask.documents)) for plan in plans)
    assert total == mask.total_entries(length) * plans[0].slices


@settings(max_examples=40, deadline=None)
@given(case=placements(), strategy=st.sampled_from(sorted(STRATEGIES)), direction=st.sampled_from(("forward", "backward")))
def test_copies_are_dropped_once_after_their_last_use(case, strategy: str, direction: str) -> None:
    placement, mask = case
    for rank in range(placement.world_size):
        plan = make_plan(strategy, placement, mask, rank, direction, 2, 1)
        dropped: set[Item] = set()
        for step in plan.steps:
            tiles = step.step.tiles
            used = {item for t in tiles for item in (Item("q", t.q, t.heads), Item("kv", t.k, t.heads))}
            used |= {t.item for t in step.step.sends if t.item.kind in COPIES}
            used = {item for item in used if item.chunk.owner != rank}
            assert not used & dropped
            assert not dropped & set(step.drops)
            dropped |= set(step.drops)
        assert {t.item for s in plan.steps for t in s.step.receives if t.item.kind in COPIES} <= dropped


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_rank_with_one_band_goes_straight_to_the_kernel(strategy: str) -> None:
    layout = SequenceLayout("zigzag", 1, 50)
    dense = make_plan(strategy, layout, AttentionMask.dense(50), 0, "forward", 1, 1)
    assert dense.whole is not None
    assert dense.whole.band[:4] == (0, 50, 0, 50)
    packed = make_plan(strategy, layout, AttentionMask(((0, 20, 50),)), 0, "forward", 1, 1)
    padded = make_plan(strategy, layout, AttentionMask(((0, 49),)), 0, "forward", 1, 1)
    assert packed.whole is None
    assert padded.whole is None, "rows of padding would keep what the kernel left there"


def test_chunks_of_one_owner_go_through_the_kernel_together() -> None:
    """Zigzag: a rank's two chunks of queries against an earlier rank's first chunk are one rectangle."""
    layout = SequenceLayout("zigzag", 4, 64)
    plan = make_plan("ring", layout, AttentionMask.dense(64), 1, "forward", 1, 1)
    for step in plan.steps[1:]:
        assert len(step.work) <= 1
        assert all(len(work.bands) == 1 for work in step.work)


def test_plans_are_made_once() -> None:
    again = [make_plan("ring", SequenceLayout("zigzag", 4, 64), AttentionMask.dense(64), 1, "forward", 1, 1) for _ in range(2)]
    assert again[0] is again[1]


def test_all_tokens_of_many_ranks_are_one_kernel_call() -> None:
    """Ulysses over 64 ranks: 128 chunks that continue each other are one run of keys."""
    grouped = Grouped(SequenceLayout("zigzag", 64, 64 * 16), (tuple(range(64)),))
    plan = make_plan("ring", grouped, AttentionMask.dense(64 * 16), 0, "forward", 8, 1)
    assert plan.whole is not None
    assert plan.whole.band == (0, 1024, 0, 1024, None, 0)


def test_the_collector_runs_again_when_the_last_thread_is_done() -> None:
    first, second = plan._collector.paused(), plan._collector.paused()
    with first:
        with second:
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="unknown attention strategy"):
        make_plan("rnig", SequenceLayout("zigzag", 4, 64), AttentionMask.dense(64), 1, "forward", 1, 1)
    assert gc.isenabled()
