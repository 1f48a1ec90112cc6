"""The balanced layout: how even it is, that it is a layout like any other, and that attention over it is exact."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.bench.mixes import MIXES, mixed_borders
from lctrain.kernels.attention import reference
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.balance import imbalance
from lctrain.parallel.deal import EVEN_ENOUGH, SMALLEST_BLOCK, balanced_layout, make_layout
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.live import live_pairs
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.strategy import NAMES


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 16])
def test_even_on_realistic_documents_where_zigzag_is_not(mix: str, world_size: int) -> None:
    length, worst = 131_071, 1.0
    for seed in range(8):
        mask = AttentionMask((mixed_borders(mix, length, seed),))
        layout = balanced_layout(world_size, length, mask.documents)
        assert imbalance(layout, mask) <= EVEN_ENOUGH
        assert layout.chunk_length >= SMALLEST_BLOCK
        worst = max(worst, imbalance(SequenceLayout("zigzag", world_size, length), mask))
    assert worst < 1.001 if mix == "one document" else worst > (1.2 if world_size == 2 else 1.3)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8, 16])
def test_even_over_the_sum_of_rows_and_under_a_window(world_size: int) -> None:
    length = 65_536
    rows = tuple(mixed_borders(mix, length, 0) for mix in MIXES if mix != "one document")
    for window in (None, 1000, 20_000):
        layout = balanced_layout(world_size, length, rows, window)
        assert imbalance(layout, AttentionMask(rows, window=window)) <= EVEN_ENOUGH


def test_no_more_blocks_than_needed() -> None:
    assert balanced_layout(4, 4096, [(0, 1024, 2048, 3072, 4096)]) == SequenceLayout("balanced", 4, 4096, (0, 1, 2, 3))
    assert balanced_layout(4, 32_768, [(0, 8100, 16_300, 24_700, 32_768)]).chunks == 1, "2 % off is even enough"
    one_document = balanced_layout(4, 4096, [(0, 4096)])
    assert one_document.owners == (0, 1, 2, 3, 3, 2, 1, 0), "the zigzag layout"
    assert balanced_layout(4, 1000, [(0, 3, 1000)]).chunks == 2, "sixteen blocks would be shorter than the shortest"
    assert balanced_layout(4, 1000, [(0, 300, 1000)], smallest_block=1).chunks > 2


def test_evener_than_needed_by_exchanges() -> None:
    uneven = []
    for mix, world_size, seed in itertools.product(list(MIXES)[:4], (4, 8, 16), range(4)):
        mask = AttentionMask((mixed_borders(mix, 131_071, seed),))
        uneven.append(imbalance(balanced_layout(world_size, 131_071, mask.documents), mask))
    assert sum(uneven) / len(uneven) < 1.015


def test_documents_stay_on_few_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    four_equal = balanced_layout(8, 8192, [(0, 2048, 4096, 6144, 8192)]).owners
    assert four_equal is not None
    quarter = len(four_equal) // 4
    assert [len(set(four_equal[at : at + quarter])) for at in range(0, len(four_equal), quarter)] == [2, 2, 2, 2]

    def received() -> int:
        total = 0
        for seed in range(4):
            mask = AttentionMask((mixed_borders("uniform", 131_072, seed),))
            layout = balanced_layout(16, 131_072, mask.documents)
            segments = [segment for rank in range(16) for segment in layout.segments(rank)]
            needed = live_pairs(segments, mask).reshape(16, layout.chunks, -1).any(axis=1)
            total += int(needed.sum()) * layout.chunk_length
        return total

    kept = received()
    monkeypatch.setattr("lctrain.parallel.deal._SLACK", -1.0)  # nobody is ever preferred for the keys that it has
    assert kept < 0.9 * received()


borders = st.lists(st.integers(1, 200), max_size=12).map(lambda lengths: (0, *itertools.accumulate(lengths)))


@settings(deadline=None)
@given(st.integers(1, 9), st.lists(borders, min_size=1, max_size=3), st.integers(0, 7), st.none() | st.integers(1, 99))
def test_a_layout_like_any_other(world_size: int, rows: list[tuple[int, ...]], padding: int, window: int | None) -> None:
    length = max(1, max(row[-1] for row in rows) + padding)
    layout = balanced_layout(world_size, length, rows, window, smallest_block=4)
    assert layout == balanced_layout(world_size, length, [list(row) for row in rows], window, smallest_block=4)
    assert hash(layout) == hash(SequenceLayout("balanced", world_size, length, layout.owners))
    indices = torch.stack([layout.indices(rank) for rank in range(world_size)])
    assert torch.equal(indices.flatten().sort().values, torch.arange(layout.padded_length))
    assert (indices.diff(dim=1) > 0).all(), "rising positions"
    assert (indices[:, 0].diff() > 0).all(), "ranks are numbered by their first block"
    assert layout.padded_length - length < world_size * layout.chunks
    x = torch.randn(2, length)
    shards = [layout.shard(x, rank, dim=1, pad=-1) for rank in range(world_size)]
    assert torch.equal(layout.unshard(shards, dim=1), x)
    zigzag = SequenceLayout("zigzag", world_size, length)
    there = layout.convert(shards, zigzag, dim=1, pad=-1)
    assert all(torch.equal(shard, zigzag.shard(x, rank, 1, -1)) for rank, shard in enumerate(there))
    back = zigzag.convert(there, layout, dim=1, pad=-1)
    assert all(map(torch.equal, back, shards))


def test_what_is_no_layout() -> None:
    with pytest.raises(ValueError, match=r"'balanced' needs owners of blocks; .*make_layout"):
        SequenceLayout("balanced", 2, 8)
    with pytest.raises(ValueError, match="'zigzag' takes no owners"):
        SequenceLayout("zigzag", 2, 8, (0, 1))
    for owners in ((0, 0, 1), (0, 0), (0, 2), ()):
        with pytest.raises(ValueError, match="ranks 0 to 1 needs equally many blocks"):
            SequenceLayout("balanced", 2, 8, owners)
    with pytest.raises(ValueError, match=r"unknown sequence layout 'even': choose one of .*striped, balanced"):
        make_layout("even", 2, 8, [(0, 8)])
    for kind in KINDS:
        assert make_layout(kind, 2, 8, [(0, 8)]) == SequenceLayout(kind, 2, 8)
    assert "owners" not in str(balanced_layout(64, 1 << 20, [(0, 1 << 20)])), "error messages stay readable"


ROWS = ((0, 7, 40, 41, 150, 163), (0, 90, 170))
LENGTH = 171


def _layout(world_size: int, shuffled: bool) -> SequenceLayout:
    """As dealt for ROWS, or with blocks anywhere: attention must be right for any deal."""
    if not shuffled:
        return balanced_layout(world_size, LENGTH, ROWS, smallest_block=4)
    order = torch.randperm(5 * world_size, generator=torch.Generator().manual_seed(world_size)) % world_size
    return SequenceLayout("balanced", world_size, LENGTH, tuple(order.tolist()))


def _attend(rank: int, world_size: int, layout: SequenceLayout, whole: list[torch.Tensor], window: int | None, strategy: str):
    group = RankGroup(torch.distributed.group.WORLD)
    q, k, v, dout = (layout.shard(x, rank, dim=1) for x in whole)
    shards = [x.requires_grad_() for x in (q, k, v)]
    mask = AttentionMask(ROWS, window=window)
    out = sequence_parallel_attention(*shards, layout=layout, mask=mask, group=group, strategy=strategy)[0]
    return [out.detach(), *torch.autograd.grad(out, shards, dout)]


@pytest.mark.parametrize(
    ("world_size", "shuffled", "strategy"),
    [*((world_size, False, "ring") for world_size in (1, 2, 3, 4)), *((3, True, name) for name in NAMES)],
)
def test_attention_equals_the_unsharded_one(world_size: int, shuffled: bool, strategy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, LENGTH, heads, 8) for heads in (4, 2, 2, 4))
    q, k, v, dout = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
    layout = _layout(world_size, shuffled)
    for window in (None, 25):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = reference.attention(*leaves, AttentionMask(ROWS, window=window).live(LENGTH))[0]
        expected = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        ranks = run_ranks(_attend, world_size, layout, [q, k, v, dout], window, strategy)
        for shards, whole in zip(zip(*ranks, strict=True), expected, strict=True):
            torch.testing.assert_close(layout.unshard(shards, dim=1), whole, rtol=1e-11, atol=1e-11)
