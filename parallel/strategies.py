"""Strategies: functions from the live tiles of a sharded sequence to a schedule.

ring        Keys and values travel from rank to rank, towards lower ranks, one hop a step, and only as far as some rank still
            needs them. With the zigzag layout and a causal mask a rank's second chunk is dead for all ranks after the wrap
            from 0 to W-1, so a quarter of the published ring's traffic never happens; windows and document borders trim more.
all_gather  Every rank sends its keys and values directly to all that need them, in one step.

Backward sends keys and values the same way. In the ring, gradients dK, dV follow one step behind and go straight home from
the last rank that adds to them. Off-diagonal local tiles come first, to hide the first hop; diagonal ones come last, to hide
the gradients' last hop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from lctrain.parallel.checker import check
from lctrain.parallel.schedule import Chunk, Direction, Item, Schedule, Step, Tile, TileMap, Transfer


class _Builder:
    """Collects steps; a transfer is entered once and appears on both sides."""

    def __init__(self, world_size: int, steps: int) -> None:
        self.tiles: list[list[list[Tile]]] = [[[] for _ in range(steps)] for _ in range(world_size)]
        self.sends: list[list[list[Transfer]]] = [[[] for _ in range(steps)] for _ in range(world_size)]
        self.receives: list[list[list[Transfer]]] = [[[] for _ in range(steps)] for _ in range(world_size)]

    def compute(self, rank: int, step: int, tiles: tuple[Tile, ...]) -> None:
        self.tiles[rank][step] += tiles

    def transfer(self, step: int, source: int, target: int, kind: str, chunk: Chunk) -> None:
        item = Item(kind, chunk)
        self.sends[source][step].append(Transfer(item, target))
        self.receives[target][step].append(Transfer(item, source))

    def schedule(self, strategy: str, direction: Direction, buffers: int) -> Schedule:
        ranks = []
        for tiles, sends, receives in zip(self.tiles, self.sends, self.receives, strict=True):
            steps = zip(tiles, sends, receives, strict=True)
            ranks.append(tuple(Step(tuple(t), tuple(sorted(s)), tuple(sorted(r))) for t, s, r in steps))
        return Schedule(strategy, direction, tuple(ranks), buffers)


def _ring(live: TileMap, direction: Direction) -> Schedule:
    world, backward = live.world_size, direction == "backward"
    plan = _Builder(world, world + backward)
    for rank in range(world):
        diagonal = tuple(tile for tile in live.tiles(rank, rank) if tile.q == tile.k)
        early = tuple(tile for tile in live.tiles(rank, rank) if tile.q != tile.k)
        plan.compute(rank, 0, early if backward else live.tiles(rank, rank))
        for step in range(1, world):
            plan.compute(rank, step, live.tiles(rank, (rank + step) % world))
        if backward:
            plan.compute(rank, world, diagonal)
    for owner in range(world):
        for chunk in (Chunk(owner, index) for index in range(live.chunks)):
            stops = [hop for hop in range(1, world) if live.needs((owner - hop) % world, chunk)]
            for hop in range(1, max(stops, default=0) + 1):
                plan.transfer(hop - 1, (owner - hop + 1) % world, (owner - hop) % world, "kv", chunk)
            if backward and stops:
                for hop in range(stops[0], stops[-1]):
                    plan.transfer(hop + 1, (owner - hop) % world, (owner - hop - 1) % world, "dkv", chunk)
                plan.transfer(stops[-1] + 1, (owner - stops[-1]) % world, owner, "dkv", chunk)
    # kv: one in use and one arriving; dkv: one growing, one arriving to grow further and one coming home.
    return plan.schedule("ring", direction, buffers=(5 if backward else 2) * live.chunks)


def _all_gather(live: TileMap, direction: Direction) -> Schedule:
    world, backward = live.world_size, direction == "backward"
    plan = _Builder(world, (3 if backward else 2) if world > 1 else 1)
    for rank in range(world):
        local = live.tiles(rank, rank)
        if not backward or world == 1:
            plan.compute(rank, 0, local)
        else:
            plan.compute(rank, 0, tuple(tile for tile in local if tile.q != tile.k))
            plan.compute(rank, 2, tuple(tile for tile in local if tile.q == tile.k))
        for other in range(world):
            if other == rank:
                continue
            plan.compute(rank, 1, live.tiles(rank, other))
            for chunk in (Chunk(other, index) for index in range(live.chunks)):
                if live.needs(rank, chunk):
                    plan.transfer(0, other, rank, "kv", chunk)
                    if backward:
                        plan.transfer(2, rank, other, "dkv", chunk)
    # Backward ends with everyone's share of this rank's gradients in flight while its own share of others' has left.
    return plan.schedule("all_gather", direction, buffers=(3 if backward else 1) * max(1, world - 1) * live.chunks)


STRATEGIES: dict[str, Callable[[TileMap, Direction], Schedule]] = {"ring": _ring, "all_gather": _all_gather}


@lru_cache(maxsize=1024)
def make_schedule(strategy: str, live: TileMap, direction: Direction) -> Schedule:
    """The checked schedule of a strategy for these live tiles; ValueError for an unknown strategy."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown attention strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    schedule = STRATEGIES[strategy](live, direction)
    check(schedule, live)
    return schedule
