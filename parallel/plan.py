"""AttentionPlan: one rank's part of a schedule with its masks worked out, ready to execute."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import NamedTuple

from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask, RowBand
from lctrain.parallel.schedule import Direction, Schedule, Step, Tile, TileMap
from lctrain.parallel.strategies import make_schedule


class Work(NamedTuple):
    """Bands of the local queries against the key chunks [first, last] of one owner, in both shards' local indices."""

    owner: int
    first: int
    last: int
    bands: tuple[RowBand, ...]


class PlannedStep(NamedTuple):
    """A step of the schedule, its work, and the owners whose keys are not needed after it."""

    step: Step
    work: tuple[Work, ...]
    drops: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """What one rank does in one direction.

    whole: the single band that is all of the work, if it covers every row of the batch and needs no communication; the
        executor then returns the kernel's own result without accumulators.
    """

    layout: SequenceLayout
    rank: int
    schedule: Schedule
    steps: tuple[PlannedStep, ...]
    whole: RowBand | None


@lru_cache(maxsize=64)
def live_tiles(layout: SequenceLayout, mask: AttentionMask) -> TileMap:
    """The live tiles of a masked layout."""
    return TileMap(layout, mask)


@lru_cache(maxsize=256)
def make_plan(
    strategy: str, layout: SequenceLayout, mask: AttentionMask, rank: int, direction: Direction
) -> AttentionPlan:  # cached: all layers of a model ask for the same few
    """The plan of `rank` for a checked schedule."""
    live = live_tiles(layout, mask)
    schedule = make_schedule(strategy, live, direction)
    steps = schedule.ranks[rank]
    last_use: dict[int, int] = {}
    for index, step in enumerate(steps):
        owners = [tile.k.owner for tile in step.tiles] + [t.item.chunk.owner for t in step.sends if t.item.kind == "kv"]
        last_use.update((owner, index) for owner in owners if owner != rank)
    planned = []
    for index, step in enumerate(steps):
        work = tuple(_work(mask, layout, tiles, live) for tiles in _by_owner(step.tiles))
        drops = tuple(owner for owner, last in last_use.items() if last == index)
        planned.append(PlannedStep(step, work, drops))
    return AttentionPlan(layout, rank, schedule, tuple(planned), _whole(planned, layout, mask))


def _by_owner(tiles: tuple[Tile, ...]) -> list[list[Tile]]:
    owners: dict[int, list[Tile]] = {}
    for tile in tiles:
        owners.setdefault(tile.k.owner, []).append(tile)
    return list(owners.values())


def _work(mask: AttentionMask, layout: SequenceLayout, tiles: list[Tile], live: TileMap) -> Work:
    """The bands of some tiles of one owner: all chunks together where nothing but these tiles is live in their product."""
    rank, owner = tiles[0].q.owner, tiles[0].k.owner
    queries, keys = sorted({tile.q.index for tile in tiles}), sorted({tile.k.index for tile in tiles})
    product = {t for t in live.tiles(rank, owner) if t.q.index in queries and t.k.index in keys}
    if product == set(tiles):
        bands = mask.bands(layout, (rank, queries), (owner, keys))
    else:
        bands = tuple(band for t in tiles for band in mask.bands(layout, (rank, (t.q.index,)), (owner, (t.k.index,))))
    return Work(owner, keys[0], keys[-1], bands)


def _whole(steps: list[PlannedStep], layout: SequenceLayout, mask: AttentionMask) -> RowBand | None:
    parts = [part for step in steps for work in step.work for part in work.bands]
    if layout.world_size > 1 or len(parts) != 1:
        return None
    part = parts[0]
    rows = part.row1 is None or (part.row0, part.row1) == (0, len(mask.documents))
    covers = rows and (part.band.q0, part.band.q1) == (0, layout.local_length)
    return part if covers else None
