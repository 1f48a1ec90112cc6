"""Cutting a band into blocks for a fused kernel."""

import itertools
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lctrain.kernels.attention import blocks
from lctrain.kernels.attention.band import Band
from lctrain.kernels.attention.blocks import cut

bounds = st.none() | st.integers(-90, 90)


def check(band: Band) -> None:
    size = max(band.q1, band.k1)
    covered = torch.zeros(size, size, dtype=torch.int64)
    for block, causal in cut(band):
        live = block.live()
        assert live.any(dim=1).all(), f"{block} has an empty row: a fused kernel would return nonsense for it"
        if causal:
            rows, columns = live.shape
            assert rows == columns
            assert torch.equal(live, torch.ones_like(live).tril())
        covered[block.q0 : block.q1, block.k0 : block.k1] += live
    wanted = torch.zeros_like(covered)
    wanted[band.q0 : band.q1, band.k0 : band.k1] = band.live()
    assert torch.equal(covered, wanted)


@given(st.integers(0, 10), st.integers(1, 60), st.integers(0, 10), st.integers(1, 60), bounds, bounds)
def test_blocks_have_exactly_the_live_entries(
    q0: int, rows: int, k0: int, columns: int, lo: int | None, hi: int | None
) -> None:
    band = Band(q0, q0 + rows, k0, k0 + columns, lo, hi).trim()
    if band is not None:
        with patch.object(blocks, "MASKED_ROWS", (4, 16)):  # so that small bands are cut as often as large ones are
            check(band)


def test_every_small_band() -> None:
    offsets = (None, *range(-4, 5))
    for rows, columns, lo, hi in itertools.product(range(1, 5), range(1, 5), offsets, offsets):
        band = Band(1, 1 + rows, 0, columns, lo, hi).trim()
        if band is not None:
            with patch.object(blocks, "MASKED_ROWS", (1, 2)):
                check(band)


@pytest.mark.parametrize("window", [1, 40, 200, 499])
def test_windows_of_real_size(window: int) -> None:
    check(Band(0, 500, 0, 500, 1 - window, 0).trim())


def test_causal_square_is_one_block() -> None:
    assert cut(Band(0, 64, 0, 64, None, 0)) == [(Band(0, 64, 0, 64, None, 0), True)]


def test_full_rectangle_is_one_block_without_mask() -> None:
    assert cut(Band(5, 9, 0, 64)) == [(Band(5, 9, 0, 64), False)]


def test_masked_blocks_waste_at_most_half() -> None:
    """What the kernel computes for a narrow window stays near what is live, however long the sequence."""
    band = Band(0, 20_000, 0, 20_000, -511, 0)
    computed = sum((b.q1 - b.q0) * (b.k1 - b.k0) for b, _ in cut(band))
    assert computed < 2 * band.entries
