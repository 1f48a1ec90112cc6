"""SequenceLayout: ownership, padding, sharding, conversion; labels and positions of packed documents."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lctrain.parallel.layout import (
    IGNORE,
    KINDS,
    SequenceLayout,
    count_targets,
    document_positions,
    shift_labels,
)


@st.composite
def layouts(draw: st.DrawFn, ranks: int | None = None, length: int | None = None) -> SequenceLayout:
    ranks, length = ranks or draw(st.integers(1, 7)), length or draw(st.integers(1, 70))
    kind = draw(st.sampled_from((*KINDS, "balanced")))
    if kind != "balanced":
        return SequenceLayout(kind, ranks, length)
    blocks = draw(st.integers(1, 4))
    return SequenceLayout(kind, ranks, length, tuple(draw(st.permutations(list(range(ranks)) * blocks))))


@given(layouts())
def test_every_token_has_one_owner(layout: SequenceLayout) -> None:
    owned = torch.cat([layout.indices(rank) for rank in range(layout.world_size)])
    assert torch.equal(owned.sort().values, torch.arange(layout.padded_length))
    assert layout.padded_length >= layout.length
    assert layout.padded_length - layout.length < layout.world_size * layout.chunks, "more padding than needed"
    assert layout.local_length * layout.world_size == layout.padded_length


@given(layouts())
def test_segments_spell_out_the_indices(layout: SequenceLayout) -> None:
    for rank in range(layout.world_size):
        at = 0
        for segment in layout.segments(rank):
            assert segment.local == at
            assert segment.tokens == layout.chunk_length
            at += segment.tokens
        assert at == layout.local_length
        assert len(layout.segments(rank)) == layout.chunks


def test_what_the_kinds_mean() -> None:
    def owned(kind: str) -> list[list[int]]:
        return [SequenceLayout(kind, 2, 8).indices(rank).tolist() for rank in range(2)]

    assert owned("contiguous") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert owned("zigzag") == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert owned("striped") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    dealt = SequenceLayout("balanced", 2, 8, (1, 0, 0, 1))
    assert [dealt.indices(rank).tolist() for rank in range(2)] == [[2, 3, 4, 5], [0, 1, 6, 7]]


@given(layouts(), st.sampled_from([0, 1, -1]))
def test_shard_and_unshard_are_inverse(layout: SequenceLayout, dim: int) -> None:
    shape = [2, 3]
    shape[dim] = layout.length
    whole = torch.randn(shape)
    shards = [layout.shard(whole, rank, dim, pad=7.5) for rank in range(layout.world_size)]
    assert torch.equal(layout.unshard(shards, dim), whole)
    for rank, shard in enumerate(shards):
        assert shard.shape[dim] == layout.local_length
        padding = layout.indices(rank) >= layout.length
        assert (shard.movedim(dim, 0)[padding] == 7.5).all()


def test_more_ranks_than_tokens() -> None:
    for kind in KINDS:
        layout = SequenceLayout(kind, 5, 1)
        shards = [layout.shard(torch.tensor([42]), rank, 0, pad=IGNORE) for rank in range(5)]
        assert sum(int((shard == 42).sum()) for shard in shards) == 1
        assert layout.unshard(shards, 0).tolist() == [42]


@given(st.integers(1, 6), st.integers(1, 50), st.data())
def test_convert_between_kinds(ranks: int, length: int, data) -> None:
    one, two = (data.draw(layouts(ranks, length)) for _ in range(2))
    whole = torch.arange(1, length + 1).expand(2, -1)
    shards = [one.shard(whole, rank, 1) for rank in range(ranks)]
    moved = one.convert(shards, two, 1, pad=-1)
    for rank, shard in enumerate(moved):
        assert torch.equal(shard, two.shard(whole, rank, 1, pad=-1))
    tokens = sum(len(one.moves_to(two, source, target)[0]) for source in range(ranks) for target in range(ranks))
    assert tokens == length, "padding does not travel"


@given(layouts())
def test_convert_to_the_same_layout_moves_nothing_between_ranks(layout: SequenceLayout) -> None:
    for source in range(layout.world_size):
        for target in range(layout.world_size):
            here, there = layout.moves_to(layout, source, target)
            assert torch.equal(here, there)
            assert source == target or len(here) == 0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"unknown sequence layout 'zigzga': choose one of contiguous, zigzag, striped, balanced"
    ):
        SequenceLayout("zigzga", 2, 8)
    for world_size, length in ((0, 8), (2, 0)):
        with pytest.raises(ValueError, match=f"got {world_size} and {length}"):
            SequenceLayout("zigzag", world_size, length)
    with pytest.raises(ValueError, match="'balanced' needs owners"):
        SequenceLayout("balanced", 2, 8)
    with pytest.raises(ValueError, match="'zigzag' takes no owners"):
        SequenceLayout("zigzag", 2, 8, (0, 1))
    for owners in ((0, 0), (0, 1, 1), (0, 2), ()):
        with pytest.raises(ValueError, match="equally many blocks"):
            SequenceLayout("balanced", 2, 8, owners)
    layout = SequenceLayout("zigzag", 2, 8)
    with pytest.raises(ValueError, match=r"expected 8 tokens along dimension 1 .* \(2, 7\)"):
        layout.shard(torch.zeros(2, 7), 0, 1)
    with pytest.raises(ValueError, match="needs 2 shards, got 1"):
        layout.unshard([torch.zeros(2, 4)], 1)
    with pytest.raises(ValueError, match="expected 4 tokens"):
        layout.unshard([torch.zeros(2, 4), torch.zeros(2, 5)], 1)
    with pytest.raises(ValueError, match="length and world_size must agree"):
        layout.moves_to(SequenceLayout("zigzag", 2, 9), 0, 0)


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[int, list[tuple[int, ...]], list[int | None]]:
    length = draw(st.integers(1, 30))
    rows, following = [], []
    for _ in range(draw(st.integers(1, 3))):
        ends = draw(st.sets(st.integers(1, length), min_size=1, max_size=6))
        rows.append((0, *sorted(ends)))
        following.append(draw(st.none() | st.integers(100, 110)))
    return length, rows, following


@given(packed_rows())
def test_labels_token_by_token(case) -> None:
    length, rows, following = case
    tokens = torch.randint(0, 50, (len(rows), length))
    before = tokens.clone()
    labels = shift_labels(tokens, rows, following)
    for row, borders in enumerate(rows):
        for position in range(length):
            if position >= borders[-1]:
                expected = IGNORE
            elif position + 1 not in borders:
                expected = int(tokens[row, position + 1])
            elif position + 1 == borders[-1] and following[row] is not None:
                expected = following[row]
            else:
                expected = IGNORE
            assert int(labels[row, position]) == expected
    assert torch.equal(tokens, before)
    continued = sum(token is not None for token in following)
    assert count_targets(labels) == sum(b[-1] - (len(b) - 1) for b in rows) + continued


@given(packed_rows())
def test_positions_restart_in_every_document(case) -> None:
    length, rows, _ = case
    positions = document_positions(rows, length)
    for row, borders in enumerate(rows):
        for position in range(length):
            assert int(positions[row, position]) == position - max(border for border in borders if border <= position)


def test_one_token_documents_have_no_target() -> None:
    labels = shift_labels(torch.tensor([[5, 6, 7]]), [(0, 1, 2, 3)], [None])
    assert labels.tolist() == [[IGNORE] * 3]
    assert count_targets(labels) == 0
