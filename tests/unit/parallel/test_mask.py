"""AttentionMask: bands between any two shards against the mask written out."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lctrain.kernels.attention.band import Band
from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.mask import AttentionMask


@st.composite
def cases(draw: st.DrawFn) -> tuple[SequenceLayout, AttentionMask]:
    length = draw(st.integers(1, 48))
    kind, ranks = draw(st.sampled_from((*KINDS, "balanced"))), draw(st.integers(1, 5))
    owners = tuple(draw(st.permutations(list(range(ranks)) * 3))) if kind == "balanced" else None
    layout = SequenceLayout(kind, ranks, length, owners)
    ends = st.sets(st.integers(1, length), min_size=1, max_size=5)
    rows = [(0, *sorted(draw(ends))) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        rows[-1] = rows[0]  # neighbouring equal rows share their bands
    window = draw(st.none() | st.integers(1, 50))
    return layout, AttentionMask(tuple(rows), draw(st.booleans()), window)


def padded(mask: AttentionMask, layout: SequenceLayout) -> torch.Tensor:
    """The mask written out with the layout's padding, which sees nothing and is seen by nothing."""
    live = torch.zeros(len(mask.documents), layout.padded_length, layout.padded_length, dtype=torch.int64)
    live[:, : layout.length, : layout.length] = mask.live(layout.length)
    return live


@settings(max_examples=80)
@given(cases(), st.data())
@example((SequenceLayout("zigzag", 1, 1), AttentionMask(((0, 1),))), None)
@example((SequenceLayout("striped", 4, 7), AttentionMask(((0, 2, 7), (0, 7)), True, 3)), None)
def test_bands_are_the_mask(case, data) -> None:
    layout, mask = case
    whole, every = padded(mask, layout), range(layout.chunks)
    for mine in range(layout.world_size):
        for theirs in range(layout.world_size):
            queries, keys = (mine, every), (theirs, every)
            if data is not None and data.draw(st.booleans()):
                queries, keys = ((rank, data.draw(st.sets(st.sampled_from(list(every))))) for rank in (mine, theirs))
            wanted = whole[:, layout.indices(mine)][:, :, layout.indices(theirs)].clone()
            for chosen, dim in ((queries[1], 1), (keys[1], 2)):
                for chunk in set(every) - set(chosen):
                    wanted.narrow(dim, chunk * layout.chunk_length, layout.chunk_length).zero_()
            found = torch.zeros_like(wanted)
            for row0, row1, band in mask.bands(layout, queries, keys):
                assert band == band.trim()
                found[row0:row1, band.q0 : band.q1, band.k0 : band.k1] += band.live()
            assert torch.equal(found, wanted), (queries, keys)
            assert mask.entries(layout, queries, keys) == int(wanted.sum())


@given(cases())
def test_total_entries(case) -> None:
    layout, mask = case
    assert mask.total_entries(layout.length) == int(mask.live(layout.length).sum())


@given(cases())
def test_live_entry_by_entry(case) -> None:
    layout, mask = case
    live = mask.live(layout.length)
    for row, borders in enumerate(mask.documents):
        for q in range(layout.length):
            for k in range(layout.length):
                document = [sum(border <= at for border in borders) for at in (q, k)]
                sees = document[0] == document[1] < len(borders)
                sees &= k <= q or not mask.causal
                sees &= mask.window is None or abs(q - k) < mask.window
                assert bool(live[row, q, k]) == sees


def test_one_row_stands_for_all() -> None:
    layout = SequenceLayout("zigzag", 2, 16)
    (part,) = AttentionMask.dense(16).bands(layout, (0, (0,)), (0, (0,)))
    assert part == (0, None, Band(0, 4, 0, 4, None, 0))


def test_equal_rows_share_bands() -> None:
    mask = AttentionMask(((0, 8), (0, 8), (0, 3, 8)))
    layout = SequenceLayout("contiguous", 1, 8)
    rows = [(row0, row1) for row0, row1, _ in mask.bands(layout, (0, (0,)), (0, (0,)))]
    assert rows == [(0, 2), (2, 3), (2, 3)]


def test_local_work_of_a_dense_sequence_is_one_kernel_call() -> None:
    mask = AttentionMask.dense(4096)
    for kind in KINDS:
        layout = SequenceLayout(kind, 4, 4096)
        for rank in range(4):
            every = range(layout.chunks)
            assert len(mask.bands(layout, (rank, every), (rank, every))) == 1


def test_zigzag_and_striped_share_causal_work_evenly() -> None:
    length, ranks = 1 << 16, 8
    mask = AttentionMask.dense(length)

    def imbalance(kind: str) -> float:
        layout = SequenceLayout(kind, ranks, length)
        every = range(layout.chunks)
        work = [sum(mask.entries(layout, (q, every), (k, every)) for k in range(ranks)) for q in range(ranks)]
        assert sum(work) == length * (length + 1) // 2
        return max(work) * ranks / sum(work)

    assert imbalance("zigzag") == 1.0
    assert imbalance("striped") < 1.001
    assert imbalance("contiguous") > 1.8


@pytest.mark.parametrize("borders", [(), (0,), (1, 5), (0, 5, 5), (0, 5, 3), (0, 0)])
def test_impossible_borders_are_refused(borders: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="document borders must rise from 0"):
        AttentionMask((borders,))


def test_impossible_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        AttentionMask(())
    with pytest.raises(ValueError, match="window=0"):
        AttentionMask(((0, 4),), window=0)
