"""Bands against boolean masks written out."""

import itertools
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lctrain.kernels.attention.band import Band, join, join_all

SIZE = 40
"""Rows and columns of the masks written out: all bands below fit."""


def written_out(*bands: Band) -> torch.Tensor:
    """How often each entry of a SIZE x SIZE mask is live in the bands, entry by entry from the definition."""
    rows, columns = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None]
    total = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    for q0, q1, k0, k1, lo, hi in bands:
        live = (rows >= q0) & (rows < q1) & (columns >= k0) & (columns < k1)
        if lo is not None:
            live &= columns - rows >= lo
        if hi is not None:
            live &= columns - rows <= hi
        total += live
    return total


bounds = st.none() | st.integers(-45, 45)
corners = st.integers(0, 20)
sizes = st.integers(0, 20)


@st.composite
def bands(draw: st.DrawFn) -> Band:
    q0, k0 = draw(corners), draw(corners)
    return Band(q0, q0 + draw(sizes), k0, k0 + draw(sizes), draw(bounds), draw(bounds))


@given(bands())
def test_entries_counts_what_is_live(band: Band) -> None:
    assert band.entries == int(written_out(band).sum())
    if band.q1 > band.q0 and band.k1 > band.k0:
        assert band.entries == int(band.live().sum())
        assert torch.equal(band.live().long(), written_out(band)[band.q0 : band.q1, band.k0 : band.k1])


@given(bands())
def test_trim_keeps_the_entries_and_nothing_else(band: Band) -> None:
    trimmed = band.trim()
    if trimmed is None:
        assert band.entries == 0
        return
    assert torch.equal(written_out(trimmed), written_out(band))
    live = trimmed.live()
    assert live.any(dim=1).all(), "a row without a live entry"
    assert live[:, [0, -1]].any(dim=0).all(), "a dead border column"
    assert trimmed.full == bool(live.all())
    for bound in ("lo", "hi"):
        if getattr(trimmed, bound) is not None:
            loose = trimmed._replace(**{bound: None})
            assert loose.entries > trimmed.entries, f"{bound} does not bind"
    assert trimmed.trim() == trimmed


@given(bands(), bands())
def test_join_is_exact_or_refuses(one: Band, two: Band) -> None:
    apart = written_out(one, two)
    assume(int(apart.max()) <= 1)
    whole = join(one, two)
    if whole is not None:
        assert torch.equal(written_out(whole), apart)


@given(bands(), st.booleans(), st.integers(1, 19))
def test_join_undoes_a_split(band: Band, by_rows: bool, at: int) -> None:
    size = band.q1 - band.q0 if by_rows else band.k1 - band.k0
    assume(at < size)
    if by_rows:
        one, two = band._replace(q1=band.q0 + at), band._replace(q0=band.q0 + at)
    else:
        one, two = band._replace(k1=band.k0 + at), band._replace(k0=band.k0 + at)
    assert join(one, two) == join(two, one) == band


@given(bands(), st.lists(st.integers(1, 19), max_size=3), st.lists(st.integers(1, 19), max_size=3), st.randoms())
@settings(max_examples=60)
def test_join_all_keeps_the_entries(band: Band, row_cuts: list[int], column_cuts: list[int], random) -> None:
    rows = sorted({band.q0, band.q1, *(band.q0 + cut for cut in row_cuts if band.q0 + cut < band.q1)})
    columns = sorted({band.k0, band.k1, *(band.k0 + cut for cut in column_cuts if band.k0 + cut < band.k1)})
    parts = [
        part
        for q0, q1 in itertools.pairwise(rows)
        for k0, k1 in itertools.pairwise(columns)
        if (part := Band(q0, q1, k0, k1, band.lo, band.hi).trim())
    ]
    random.shuffle(parts)
    joined = join_all(parts)
    assert len(joined) <= len(parts)
    assert torch.equal(written_out(*joined), written_out(*parts))


def first_pairs_joined(bands: list[Band]) -> list[Band]:
    """The definition of join_all: join the first pair that joins, and start again."""
    for one, two in itertools.combinations(range(len(bands)), 2):
        if whole := join(bands[one], bands[two]):
            return first_pairs_joined([*bands[:one], whole, *bands[one + 1 : two], *bands[two + 1 :]])
    return bands


@st.composite
def grids(draw: st.DrawFn) -> list[Band]:
    """What chunks of queries against chunks of keys give: trimmed bands in a grid, whose diagonals need not fit together."""
    size, length = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    starts = st.lists(st.integers(0, 15), min_size=size, max_size=size).map(lambda drawn: [length * at for at in drawn])
    queries, keys = (draw(starts | st.just([length * at for at in range(size)])) for _ in range(2))
    window, causal = draw(st.none() | st.integers(1, 6 * length)), draw(st.booleans())
    parts = []
    for (q, row), (k, column) in itertools.product(enumerate(queries), enumerate(keys)):
        apart = row - column + (k - q) * length
        lo, hi = None if window is None else apart - window + 1, apart if causal else None
        parts.append(Band(q * length, (q + 1) * length, k * length, (k + 1) * length, lo, hi).trim())
    return [part for part in parts if part]


@given(grids())
def test_join_all_joins_first_pairs_first(bands: list[Band]) -> None:
    assert join_all(bands) == first_pairs_joined(bands)


def test_many_bands_join_at_once() -> None:
    """All chunks of 32 ranks against each other, as Ulysses sees them; comparing every pair anew took minutes."""
    parts = [Band(8 * q, 8 * q + 8, 8 * k, 8 * k + 8, None, 0).trim() for q in range(64) for k in range(q + 1)]
    started = time.process_time()
    assert join_all([part for part in parts if part]) == [Band(0, 512, 0, 512, None, 0)]
    assert time.process_time() - started < 5


def test_zigzag_blocks_join_into_one_kernel_call() -> None:
    """The local step of a zigzag ring: two causal squares and the full block between them are one causal square."""
    parts = [Band(0, 8, 0, 8, None, 0), Band(8, 16, 8, 16, None, 0), Band(8, 16, 0, 8)]
    assert join_all(parts) == [Band(0, 16, 0, 16, None, 0)]


@pytest.mark.parametrize("band", [Band(3, 3, 0, 5), Band(0, 5, 7, 7), Band(0, 4, 0, 4, 3, 1), Band(0, 4, 0, 4, None, -4)])
def test_empty_bands(band: Band) -> None:
    assert band.entries == 0
    assert band.trim() is None


def test_entries_of_a_million_tokens() -> None:
    """Constant time and exact beyond 32 bits."""
    length = 1_000_000
    assert Band(0, length, 0, length, None, 0).entries == length * (length + 1) // 2
    window = 4096
    assert Band(0, length, 0, length, 1 - window, 0).entries == length * window - window * (window - 1) // 2
