"""HeadSplit: every query head once, with the KV heads that it needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctrain.parallel.heads import HeadSplit, split_heads


@given(n_kv=st.integers(1, 12), group=st.integers(1, 8), slices=st.integers(1, 24))
def test_every_query_head_once_with_its_kv_head(n_kv: int, group: int, slices: int) -> None:
    split = split_heads(n_kv * group, n_kv, slices)
    assert split.slices == slices
    assert [head for first, end in split.q for head in range(first, end)] == list(range(n_kv * group))
    for part in range(slices):
        (q0, q1), (k0, k1) = split.q[part], split.kv[part]
        assert tuple(k0 + head for head in split.kv_of_queries(part)) == tuple(head // group for head in range(q0, q1))
        assert {head // group for head in range(q0, q1)} == set(range(k0, k1)), "no KV head that no query of the slice reads"


@given(n_kv=st.integers(1, 12), group=st.integers(1, 8), slices=st.integers(1, 24))
def test_as_even_as_possible(n_kv: int, group: int, slices: int) -> None:
    split = split_heads(n_kv * group, n_kv, slices)
    sizes = [end - first for first, end in split.q]
    assert max(sizes) - min(sizes) <= (group if n_kv >= slices else 1)
    if n_kv >= slices:
        assert [head for first, end in split.kv for head in range(first, end)] == list(range(n_kv)), "no KV head is sent twice"


@given(n_kv=st.integers(1, 12), group=st.integers(1, 8), slices=st.integers(1, 24))
def test_uniform_slices_are_grouped_attention(n_kv: int, group: int, slices: int) -> None:
    split = split_heads(n_kv * group, n_kv, slices)
    for part in range(slices):
        (q0, q1), (k0, k1) = split.q[part], split.kv[part]
        if q1 > q0 and split.is_uniform(part):
            each = (q1 - q0) // (k1 - k0)
            assert split.kv_of_queries(part) == tuple(head // each for head in range(q1 - q0))
        if n_kv >= slices:
            assert split.is_uniform(part)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "slices", "q", "kv"),
    [
        (8, 8, 3, ((0, 2), (2, 5), (5, 8)), ((0, 2), (2, 5), (5, 8))),
        (8, 2, 4, ((0, 2), (2, 4), (4, 6), (6, 8)), ((0, 1), (0, 1), (1, 2), (1, 2))),
        (6, 2, 4, ((0, 1), (1, 3), (3, 4), (4, 6)), ((0, 1), (0, 1), (1, 2), (1, 2))),
        (6, 2, 5, ((0, 1), (1, 2), (2, 3), (3, 4), (4, 6)), ((0, 1), (0, 1), (0, 1), (1, 2), (1, 2))),
        (9, 3, 2, ((0, 3), (3, 9)), ((0, 1), (1, 3))),
        (2, 1, 3, ((0, 0), (0, 1), (1, 2)), ((0, 0), (0, 1), (0, 1))),
    ],
)
def test_splits(heads: int, kv_heads: int, slices: int, q: tuple, kv: tuple) -> None:
    assert split_heads(heads, kv_heads, slices) == HeadSplit(q, kv, heads // kv_heads)


def test_slice_across_two_kv_heads_is_not_uniform() -> None:
    """Query heads 0-2 of KV head 0 and 3 of KV head 1 in one slice: no kernel takes that as grouped attention."""
    split = HeadSplit(((0, 4), (4, 6)), ((0, 2), (1, 2)), 3)
    assert not split.is_uniform(0)
    assert split.is_uniform(1)
    assert split.kv_of_queries(0) == (0, 0, 0, 1)
