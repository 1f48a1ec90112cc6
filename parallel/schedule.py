"""Schedule: a sequence-parallel attention strategy as plain data.

For every rank a list of steps; each step names tiles to compute and transfers to start. All ranks walk through the steps
together: in a step a rank starts its sends and receives, computes its tiles, then waits. What arrives in a step can be used
from the next one on. Because it is data, the same object is checked, counted, drawn and executed.

Two kinds of things travel:
  copies      inputs of tiles. A copy stays where it came from.
                "kv" keys and values
  sums        partial results, which move away when sent and are added to what the receiver has.
                "dkv" gradients of keys and values
Sums of queries ("out", "dq") are made and kept by the tiles' own rank in these strategies.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask

Direction = Literal["forward", "backward"]
COPIES = ("kv",)
SUMS = ("dkv",)


class Chunk(NamedTuple):
    """One segment of one rank's tokens."""

    owner: int
    index: int


class Tile(NamedTuple):
    """Scores of one chunk of queries against one chunk of keys."""

    q: Chunk
    k: Chunk


class Item(NamedTuple):
    """Something that travels: what it is, and of which tokens."""

    kind: str
    chunk: Chunk


class Transfer(NamedTuple):
    """An item on its way to (in sends) or from (in receives) a peer."""

    item: Item
    peer: int


@dataclasses.dataclass(frozen=True)
class Step:
    """What one rank does between two waits."""

    tiles: tuple[Tile, ...] = ()
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A whole strategy in one direction.

    ranks: per rank, its steps; all ranks have equally many.
    buffers: most chunks of other ranks' items that any rank may hold at once, arriving ones included.
    """

    strategy: str
    direction: Direction
    ranks: tuple[tuple[Step, ...], ...]
    buffers: int

    @property
    def world_size(self) -> int:
        """Ranks of the sequence group."""
        return len(self.ranks)

    def sends(self, rank: int) -> dict[str, int]:
        """Chunks that `rank` sends, by kind."""
        counts: dict[str, int] = {}
        for step in self.ranks[rank]:
            for transfer in step.sends:
                counts[transfer.item.kind] = counts.get(transfer.item.kind, 0) + 1
        return counts


class TileMap:
    """Which tiles of a masked, sharded sequence are live: all that a strategy needs to know.

    Hashable and equal by content, so that schedules can be cached over batches whose documents differ but whose live tiles
    do not.
    """

    def __init__(self, layout: SequenceLayout, mask: AttentionMask) -> None:
        self.world_size, self.chunks = layout.world_size, layout.chunks
        size = self.world_size * self.chunks
        live = np.zeros((size, size), dtype=bool)
        for q in range(size):
            for k in range(size):
                live[q, k] = bool(
                    mask.bands(layout, (q // self.chunks, (q % self.chunks,)), (k // self.chunks, (k % self.chunks,)))
                )
        self._live = live
        self._key = (self.world_size, self.chunks, live.tobytes())

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TileMap) and self._key == other._key

    def is_live(self, tile: Tile) -> bool:
        """Whether the tile has any live entry."""
        return bool(self._live[self._at(tile.q), self._at(tile.k)])

    def tiles(self, queries: int, keys: int) -> tuple[Tile, ...]:
        """Live tiles of the queries of one rank against the keys of another."""
        pairs = ((a, b) for a in range(self.chunks) for b in range(self.chunks))
        tiles = (Tile(Chunk(queries, a), Chunk(keys, b)) for a, b in pairs)
        return tuple(tile for tile in tiles if self.is_live(tile))

    def needs(self, rank: int, chunk: Chunk) -> bool:
        """Whether any query of `rank` sees any key of `chunk`."""
        first = rank * self.chunks
        return bool(self._live[first : first + self.chunks, self._at(chunk)].any())

    def all_live(self) -> list[Tile]:
        """Every live tile."""
        return [tile for q in range(self.world_size) for k in range(self.world_size) for tile in self.tiles(q, k)]

    def _at(self, chunk: Chunk) -> int:
        return chunk.owner * self.chunks + chunk.index
