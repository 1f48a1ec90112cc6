"""A band cut into blocks that a fused kernel takes as they are: full rectangles, causal squares, and small masked ones.

torch's CPU kernel knows "no mask", "causal, top-left aligned" and "additive mask" only, and an additive mask of a long
sequence would not fit in memory. Cutting costs nothing: blocks hold the band's live entries and (unmasked) no others.
"""

from __future__ import annotations

from typing import NamedTuple

from lctrain.kernels.attention.band import Band

MASKED_ROWS = (64, 1024)
"""Fewest and most rows of a masked block; between these a quarter of the window, of which it then wastes an eighth."""


class Block(NamedTuple):
    """A piece of a band. causal: a square whose diagonal starts at its corner. Neither causal nor full: needs a mask."""

    band: Band
    causal: bool

    def moved(self, down: int, right: int) -> Block:
        """The same block where its band has moved to."""
        return Block(self.band.moved(down, right), self.causal)


def cut(band: Band) -> list[Block]:
    """Disjoint blocks with exactly the live entries of a trimmed band, in which every row has a live entry."""
    if band.full:
        return [Block(band, causal=False)]
    if band.lo is not None:
        return _windowed(band)
    q0, q1, k0, k1, _, hi = band
    assert hi is not None
    # Row q0 already sees the columns up to q0 + hi, and so does every later row.
    corner = q0 + hi
    side = min(q1 - q0, k1 - corner)
    blocks = [Block(Band(q0, q0 + side, corner, corner + side, None, hi), causal=True)]
    if corner > k0:
        blocks.append(Block(Band(q0, q1, k0, corner), causal=False))
    if q0 + side < q1:
        blocks.append(Block(Band(q0 + side, q1, corner, k1), causal=False))
    return blocks


def _windowed(band: Band) -> list[Block]:
    """Rows in groups: a masked corner where keys fall out of the window, then what even the group's last row still sees."""
    width = band.k1 - band.k0
    if band.lo is not None and band.hi is not None:
        width = min(width, band.hi - band.lo + 1)
    rows = max(MASKED_ROWS[0], min(MASKED_ROWS[1], width // 4))
    blocks = []
    for q0 in range(band.q0, band.q1, rows):
        part = band._replace(q0=q0, q1=min(q0 + rows, band.q1)).trim()
        if part is None:
            continue
        if part.lo is None:
            blocks += cut(part)
            continue
        corner = max(part.k0, min(part.k1, part.q1 - 1 + part.lo))
        leaving, staying = part._replace(k1=corner).trim(), part._replace(k0=corner, lo=None).trim()
        blocks += ([Block(leaving, causal=False)] if leaving else []) + (cut(staying) if staying else [])
    return blocks
