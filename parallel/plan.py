"""AttentionPlan: one rank's part of a schedule with its masks worked out, ready to execute."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

from lctrain.kernels.attention.band import Band, join_all
from lctrain.parallel.mask import AttentionMask, RowBand
from lctrain.parallel.pieces import Pieces, in_pieces
from lctrain.parallel.placement import Placement
from lctrain.parallel.schedule import COPIES, Direction, Item, Step, Tile, TileMap
from lctrain.parallel.strategies import Problem, make_schedule


class Side(NamedTuple):
    """Some chunks of one owner, as the queries or the keys of some work."""

    owner: int
    parts: tuple[int, ...]


class Work(NamedTuple):
    """Tiles that go through the kernel together: bands in the local indices of both owners, for one slice of the heads."""

    heads: int
    q: Side
    k: Side
    bands: tuple[RowBand, ...]


class PlannedStep(NamedTuple):
    """A step of the schedule, its work, and the copies that are neither used nor sent after it."""

    step: Step
    work: tuple[Work, ...]
    drops: tuple[Item, ...]


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What one rank does in one direction; of the schedule, only what this rank needs is kept.

    slices, rounded: see Schedule.
    whole: the single band that is all of the work, if it covers every row of the batch and needs no communication; the
        executor then returns the kernel's own result without accumulators.
    """

    placement: Placement
    rank: int
    direction: Direction
    slices: int
    rounded: tuple[str, ...]
    steps: tuple[PlannedStep, ...]
    whole: RowBand | None


@lru_cache(maxsize=4)  # forward and backward, and all ranks of a schedule, ask for the same one after the other
def live_tiles(placement: Placement, mask: AttentionMask) -> TileMap:
    """The live tiles of a masked layout."""
    return TileMap(placement, mask, placement.pieces if isinstance(placement, Pieces) else 1)


_held: WeakValueDictionary[tuple[object, ...], AttentionPlan] = WeakValueDictionary()


@lru_cache(maxsize=32)  # all layers of a model ask for the same few
def make_plan(
    strategy: str, placement: Placement, mask: AttentionMask, rank: int, direction: Direction, n_kv_heads: int, node: int
) -> AttentionPlan:
    """The plan of `rank` for a checked schedule; its placement may be finer than the given one (see pieces).

    Made once for as long as anyone holds it: what is prepared for a batch ahead of its step is found in the step.
    """
    key = strategy, placement, mask, rank, direction, n_kv_heads, node
    plan = _held.get(key)
    if plan is None:
        plan = _held[key] = _build(*key)
    return plan


class _Collector:
    """Python's collector of reference cycles, paused while any thread makes a schedule.

    That is hundreds of thousands of small objects without a cycle, all alive until the end. Their number alone would make the
    collector search the whole heap again and again, which takes longer than making them.
    """

    def __init__(self) -> None:
        self._lock, self._makers, self._was_on = threading.Lock(), 0, False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        with self._lock:
            if not self._makers:
                self._was_on = gc.isenabled()
                gc.disable()
            self._makers += 1
        try:
            yield
        finally:
            with self._lock:
                self._makers -= 1
                if not self._makers and self._was_on:
                    gc.enable()


_collector = _Collector()


def _build(
    strategy: str, placement: Placement, mask: AttentionMask, rank: int, direction: Direction, n_kv_heads: int, node: int
) -> AttentionPlan:
    placement = in_pieces(placement, mask)
    live = live_tiles(placement, mask)
    with _collector.paused():
        schedule = make_schedule(strategy, Problem(live, direction, n_kv_heads, node))
    steps = schedule.ranks[rank]
    last_use: dict[Item, int] = {}
    for index, step in enumerate(steps):
        used = [item for tile in step.tiles for item in (Item("q", tile.q, tile.heads), Item("kv", tile.k, tile.heads))]
        last_use.update((item, index) for item in used if item.chunk.owner != rank)
        last_use.update((t.item, index) for t in step.sends if t.item.kind in COPIES)
    planned = []
    for index, step in enumerate(steps):
        work = tuple(_work(mask, placement, tiles, live) for tiles in _by_owners(step.tiles))
        drops = tuple(item for item, last in last_use.items() if last == index)
        planned.append(PlannedStep(step, work, drops))
    whole = _whole(planned, placement, mask)
    return AttentionPlan(placement, rank, direction, schedule.slices, schedule.rounded, tuple(planned), whole)


def _by_owners(tiles: tuple[Tile, ...]) -> list[list[Tile]]:
    groups: dict[tuple[int, int, int], list[Tile]] = {}
    for tile in tiles:
        groups.setdefault((tile.heads, tile.q.owner, tile.k.owner), []).append(tile)
    return list(groups.values())


def _work(mask: AttentionMask, placement: Placement, tiles: list[Tile], live: TileMap) -> Work:
    """Tiles of one pair of owners: bands of all chunks together where nothing but these tiles is live in their product."""
    q_owner, k_owner, heads = tiles[0].q.owner, tiles[0].k.owner, tiles[0].heads
    queries, keys = (sorted(set(side)) for side in ([tile.q for tile in tiles], [tile.k for tile in tiles]))
    q_parts, k_parts = tuple(chunk.part for chunk in queries), tuple(chunk.part for chunk in keys)
    if set(live.tiles(tuple(queries), tuple(keys), heads)) == set(tiles):
        bands = mask.bands(placement, (q_owner, q_parts), (k_owner, k_parts))
    else:
        bands = _joined([b for t in tiles for b in mask.bands(placement, (q_owner, (t.q.part,)), (k_owner, (t.k.part,)))])
    return Work(heads, Side(q_owner, q_parts), Side(k_owner, k_parts), bands)


def _joined(parts: list[RowBand]) -> tuple[RowBand, ...]:
    """Fewer, larger bands with the same entries."""
    rows: dict[tuple[int, int | None], list[Band]] = {}
    for row0, row1, band in parts:
        rows.setdefault((row0, row1), []).append(band)
    return tuple(RowBand(*of, band) for of, bands in rows.items() for band in join_all(bands))


def _whole(steps: list[PlannedStep], placement: Placement, mask: AttentionMask) -> RowBand | None:
    work = [work for step in steps for work in step.work]
    parts = [part for one in work for part in one.bands]
    if placement.world_size > 1 or len(parts) != 1 or len(work) != 1:
        return None
    part = parts[0]
    rows = part.row1 is None or (part.row0, part.row1) == (0, len(mask.documents))
    return part if rows and (part.band.q0, part.band.q1) == (0, placement.local_length) else None
