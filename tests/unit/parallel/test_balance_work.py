"""Closed forms of attention work and of live pairs, against the mask written out and against bands."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lctrain.parallel.balance import imbalance, live_entries, load_balance, rank_entries
from lctrain.parallel.deal import balanced_layout, make_layout
from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.live import live_pairs
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.work import entries_before, first_keys, strided_entries


@st.composite
def masks(draw: st.DrawFn) -> tuple[int, AttentionMask]:
    length = draw(st.integers(1, 50))
    ends = st.sets(st.integers(1, length), min_size=1, max_size=6)
    rows = tuple((0, *sorted(draw(ends))) for _ in range(draw(st.integers(1, 3))))
    return length, AttentionMask(rows, draw(st.booleans()), draw(st.none() | st.integers(1, 55)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[SequenceLayout, AttentionMask]:
    length, mask = draw(masks())
    world = draw(st.integers(1, 5))
    if draw(st.booleans()):
        return SequenceLayout(draw(st.sampled_from(KINDS)), world, length), mask
    owners = draw(st.permutations(list(range(world)) * draw(st.integers(1, 4))))
    return SequenceLayout("balanced", world, length, tuple(owners)), mask


@settings(deadline=None)
@given(masks(), st.integers(1, 9))
def test_entries_of_ranges_and_strides_are_those_of_the_mask(case: tuple[int, AttentionMask], step: int) -> None:
    length, mask = case
    rule = {"causal": mask.causal, "window": mask.window}
    per_query = mask.live(length).sum(dim=(0, 2)).numpy()
    before = entries_before(mask.documents, np.arange(length + 3), **rule)
    assert before.tolist() == [0, *np.cumsum(per_query), *[per_query.sum()] * 2]
    assert strided_entries(mask.documents, step, **rule).tolist() == [per_query[r::step].sum() for r in range(step)]


@settings(deadline=None)
@given(masks())
def test_first_keys(case: tuple[int, AttentionMask]) -> None:
    length, mask = case
    live = AttentionMask(mask.documents, True, mask.window).live(length).any(dim=0).numpy()
    seen = [int(row.argmax()) if row.any() else position for position, row in enumerate(live)]
    assert first_keys(mask.documents, np.arange(length), window=mask.window).tolist() == seen


@settings(deadline=None)
@given(cases())
@example((SequenceLayout("zigzag", 1, 1), AttentionMask(((0, 1),))))
def test_work_of_ranks_and_live_pairs_agree_with_bands(case: tuple[SequenceLayout, AttentionMask]) -> None:
    layout, mask = case
    ranks, chunks = range(layout.world_size), range(layout.chunks)
    entries = [sum(mask.entries(layout, (rank, chunks), (owner, chunks)) for owner in ranks) for rank in ranks]
    assert live_entries(layout, mask) == entries
    assert load_balance(layout, mask) == (entries, imbalance(layout, mask))
    assert imbalance(layout, mask) == pytest.approx(max(entries) / np.mean(entries))
    every = [(rank, chunk) for rank in ranks for chunk in chunks]
    pairs = [[bool(mask.bands(layout, (q, (a,)), (k, (b,)))) for k, b in every] for q, a in every]
    segments = [segment for rank in ranks for segment in layout.segments(rank)]
    assert live_pairs(segments, mask).tolist() == pairs


def test_rows_of_padding_count_nothing() -> None:
    assert entries_before([(0,)], np.arange(4)).tolist() == [0] * 4
    assert strided_entries([(0,), (0, 3)], 2).tolist() == [4, 2]
    assert first_keys([(0,), (0, 2)], np.arange(4)).tolist() == [0, 0, 2, 3]
    for kind in ("zigzag", "striped", "balanced"):
        assert rank_entries(make_layout(kind, 3, 10, [(0,)]), [(0,)]) == [0, 0, 0]


def test_millions_of_tokens_do_not_overflow() -> None:
    length = 1 << 22
    layout = balanced_layout(64, length, [(0, length)] * 8)
    assert sum(rank_entries(layout, [(0, length)] * 8)) == 8 * length * (length + 1) // 2
