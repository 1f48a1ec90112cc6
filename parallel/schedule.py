"""Schedule: a sequence-parallel attention strategy as plain data.

For every rank a list of steps; each step names tiles to compute and transfers to start. All ranks walk through the steps
together: in a step a rank starts its sends and receives, computes its tiles, then waits for what is due. What has arrived by
the end of a step can be used from the next one on. Because it is data, the same object is checked, counted, simulated, drawn
and executed.

Two kinds of things travel:
  copies  inputs of tiles; the sender keeps its own.
            "q"    queries; in backward also their output gradients, log-sum-exp and delta = sum(dout * out)
            "kv"   keys and values
  sums    partial results; they leave the sender and are added to what the receiver has.
            "out"  unnormalised attention, with its log-sum-exp
            "dq"   gradients of queries
            "dkv"  gradients of keys and values
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Literal, NamedTuple

import numpy as np

from lctrain.parallel.live import live_pairs
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.placement import Placement

Direction = Literal["forward", "backward"]
COPIES = ("q", "kv")
SUMS = ("out", "dq", "dkv")


class Chunk(NamedTuple):
    """One segment of one rank's tokens."""

    owner: int
    part: int

    def __str__(self) -> str:
        return f"chunk {self.part} of rank {self.owner}"


class Tile(NamedTuple):
    """Scores of one chunk of queries against one chunk of keys, for one slice of the heads."""

    q: Chunk
    k: Chunk
    heads: int = 0

    def __str__(self) -> str:
        return f"tile of queries {self.q} and keys {self.k}, heads {self.heads}"


class Item(NamedTuple):
    """Something that travels: what it is, of which tokens and heads."""

    kind: str
    chunk: Chunk
    heads: int = 0

    def __str__(self) -> str:
        return f"{self.kind} of {self.chunk}, heads {self.heads},"


class Transfer(NamedTuple):
    """An item on its way to (in sends) or from (in receives) a peer; waited for at the end of step `until`."""

    item: Item
    peer: int
    until: int


@dataclasses.dataclass(frozen=True)
class Step:
    """What one rank starts between two waits."""

    tiles: tuple[Tile, ...] = ()
    sends: tuple[Transfer, ...] = ()
    receives: tuple[Transfer, ...] = ()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A whole strategy in one direction.

    ranks: per rank, its steps; all ranks have equally many.
    slices: parts into which the heads are split.
    buffers: most items of other ranks that any rank may hold at once, arriving ones included.
    rounded: kinds of gradients that nobody adds to on the way, so that they may travel in the inputs' dtype and still be
        rounded once only; the owner adds them up in fp32. Other gradients travel in fp32.
    """

    strategy: str
    direction: Direction
    ranks: tuple[tuple[Step, ...], ...]
    slices: int
    buffers: int
    rounded: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks of the sequence group."""
        return len(self.ranks)

    def sends(self, rank: int) -> Counter[tuple[str, int]]:
        """Items that `rank` sends, by kind and slice of heads."""
        return Counter((t.item.kind, t.item.heads) for step in self.ranks[rank] for t in step.sends)


class TileMap:
    """Which tiles of a masked, sharded sequence are live: all that a strategy needs to know.

    Hashable and equal by content, so that schedules can be cached over batches whose documents differ but whose live tiles
    do not.

    pieces: so many chunks in a row were cut out of one, and belong together.
    """

    def __init__(self, placement: Placement, mask: AttentionMask, pieces: int = 1) -> None:
        self.world_size, self.chunks, self.pieces = placement.world_size, placement.chunks, pieces
        live = live_pairs([segment for rank in range(self.world_size) for segment in placement.segments(rank)], mask)
        self._key = (self.world_size, self.chunks, pieces, live.tobytes())
        self._live: list[list[bool]] = live.tolist()  # read one by one, for which lists are faster than arrays
        self._chunks = [tuple(Chunk(rank, part) for part in range(self.chunks)) for rank in range(self.world_size)]
        self._all = [chunk for own in self._chunks for chunk in own]
        self._place = {chunk: at for at, chunk in enumerate(self._all)}
        self._partners = {"q": _live_columns(live), "kv": _live_columns(live.T)}

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TileMap) and self._key == other._key

    def chunks_of(self, rank: int) -> tuple[Chunk, ...]:
        """All chunks of a rank."""
        return self._chunks[rank]

    def whole(self, chunk: Chunk) -> int:
        """Which of its owner's chunks, before they were cut, this one belongs to."""
        return chunk.part // self.pieces

    def tiles(self, queries: tuple[Chunk, ...], keys: tuple[Chunk, ...], heads: int = 0) -> tuple[Tile, ...]:
        """Live tiles of some queries against some keys."""
        columns = [(k, k.owner * self.chunks + k.part) for k in keys]
        rows = [(q, self._live[q.owner * self.chunks + q.part]) for q in queries]
        return tuple([Tile(q, k, heads) for q, live in rows for k, at in columns if live[at]])

    def visits(self, chunk: Chunk, moving: Literal["q", "kv"], heads: int = 0) -> dict[int, list[Tile]]:
        """By rank, the live tiles of a chunk that goes there as queries ("q") or as keys ("kv")."""
        found: dict[int, list[Tile]] = {}
        for at in self._partners[moving][self._place[chunk]]:
            other = self._all[at]
            tile = Tile(chunk, other, heads) if moving == "q" else Tile(other, chunk, heads)
            found.setdefault(other.owner, []).append(tile)
        return found

    def are_all(self, tiles: list[Tile], slices: int) -> bool:
        """Whether these are the live tiles for every slice of the heads, each once."""
        if len(tiles) != slices * sum(map(len, self._partners["q"])) or len(set(tiles)) != len(tiles):
            return False
        live, place = self._live, self._place
        return all(q in place and k in place and live[place[q]][place[k]] and 0 <= heads < slices for q, k, heads in tiles)

    def every_tile(self, slices: int) -> list[Tile]:
        """Every live tile, for every slice of the heads."""
        chunks = tuple(chunk for own in self._chunks for chunk in own)
        return [tile for heads in range(slices) for tile in self.tiles(chunks, chunks, heads)]


def _live_columns(live: np.ndarray) -> list[list[int]]:
    """For every row, the columns that are True."""
    rows, columns = np.nonzero(live)
    ends = np.searchsorted(rows, np.arange(len(live)), side="right").tolist()
    found = columns.tolist()
    return [found[first:end] for first, end in zip([0, *ends], ends, strict=False)]
