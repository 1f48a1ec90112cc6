"""The checker: proves from the data alone that a schedule computes attention, once and on time, and cannot deadlock.

Every schedule passes here before it is first executed. Deadlock is impossible for any order in which ranks run: every send is
matched by a receive that its peer starts in the same step, and a rank starts all transfers of a step before it waits for any.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NoReturn

from lctrain.parallel.schedule import COPIES, SUMS, Item, Schedule, Tile, TileMap


class ScheduleError(AssertionError):
    """A schedule is wrong; the message names the rank, the step and what is wrong with it."""


def check(schedule: Schedule, tiles: TileMap) -> None:
    """Raise ScheduleError unless `schedule` is right for `tiles`.

    Each live tile is computed exactly once and no dead one is; tiles find their inputs; sends and receives match; partial
    results are complete and end with their owners, rounded ones without a stop on the way; no rank holds more than
    schedule.buffers foreign items.
    """
    _Check(schedule, tiles).run()


class _Check:
    def __init__(self, schedule: Schedule, tiles: TileMap) -> None:
        self.schedule, self.tiles = schedule, tiles
        self.where = f"{schedule.strategy} {schedule.direction} on {tiles.world_size} ranks"
        self.steps = len(schedule.ranks[0])

    def fail(self, what: str, step: int | None = None) -> NoReturn:
        raise ScheduleError(f"{self.where}{'' if step is None else f', step {step}'}: {what}")

    def run(self) -> None:
        if self.schedule.world_size != self.tiles.world_size:
            self.fail(f"made for {self.schedule.world_size} ranks")
        if any(len(steps) != self.steps for steps in self.schedule.ranks):
            self.fail("ranks disagree on the number of steps")
        self.check_matching()
        held = [self.walk_copies(rank) for rank in range(self.schedule.world_size)]
        computed, wanted = Counter(self.walk_sums(held)), Counter(self.tiles.every_tile(self.schedule.slices))
        for tile in computed | wanted if computed != wanted else ():
            if not wanted[tile]:
                self.fail(f"dead {tile} is computed")
            if computed[tile] != 1:
                self.fail(f"live {tile} is not computed exactly once")

    def check_matching(self) -> None:
        """Every transfer appears on both sides, in the same step and due in the same step."""
        for index in range(self.steps):
            sent: Counter[tuple[object, ...]] = Counter()
            received: Counter[tuple[object, ...]] = Counter()
            for rank, steps in enumerate(self.schedule.ranks):
                sent.update((rank, t.peer, t.item, t.until) for t in steps[index].sends)
                received.update((t.peer, rank, t.item, t.until) for t in steps[index].receives)
                for t in (*steps[index].sends, *steps[index].receives):
                    if t.peer == rank or t.item.kind not in COPIES + SUMS or not index <= t.until < self.steps:
                        self.fail(f"bad transfer {t} of rank {rank}", index)
            if sent != received:
                self.fail(f"not both sent and received: {next(iter((sent - received) + (received - sent)))}", index)
            if sent and max(sent.values()) > 1:
                self.fail(f"sent twice: {sent.most_common(1)[0][0]}", index)

    def walk_copies(self, rank: int) -> list[int]:
        """Copies are there when used or sent on; returns the foreign copies held in each step, from posting to last use."""
        posted: dict[Item, int] = {}
        usable: dict[Item, int] = {}
        last_use: dict[Item, int] = {}
        for index, step in enumerate(self.schedule.ranks[rank]):
            used = [item for tile in step.tiles for item in (Item("q", tile.q, tile.heads), Item("kv", tile.k, tile.heads))]
            used += [t.item for t in step.sends if t.item.kind in COPIES]
            for item in used:
                if item.chunk.owner != rank:
                    if usable.get(item, self.steps) > index:
                        self.fail(f"rank {rank} uses {item}, which has not arrived", index)
                    last_use[item] = index
            for t in step.receives:
                if t.item.kind in COPIES:
                    if t.item in posted or t.item.chunk.owner == rank:
                        self.fail(f"rank {rank} receives {t.item}, which it has", index)
                    posted[t.item], usable[t.item] = index, t.until + 1
        held = [0] * self.steps
        for item, since in posted.items():
            if item not in last_use:
                self.fail(f"rank {rank} receives {item} and never uses it")
            for index in range(since, last_use[item] + 1):
                held[index] += 1
        return held

    def walk_sums(self, held: list[list[int]]) -> list[Tile]:
        """Follow partial results home; returns all tiles that were computed, each of which is in the results as often."""
        kinds = ("out",) if self.schedule.direction == "forward" else ("dq", "dkv")
        here: list[dict[Item, list[Tile]]] = [defaultdict(list) for _ in self.schedule.ranks]
        due: dict[int, list[tuple[int, Item, list[Tile]]]] = defaultdict(list)
        arriving = [0] * len(here)
        computed: list[Tile] = []
        for index in range(self.steps):
            for rank, steps in enumerate(self.schedule.ranks):
                for t in steps[index].sends:
                    if t.item.kind in SUMS:
                        if t.item not in here[rank]:
                            self.fail(f"rank {rank} sends {t.item}, which it does not have", index)
                        if t.item.kind in self.schedule.rounded and t.peer != t.item.chunk.owner:
                            self.fail(f"rank {rank} sends {t.item}, which is rounded, to a rank that adds to it", index)
                        due[t.until].append((t.peer, t.item, here[rank].pop(t.item)))
                        arriving[t.peer] += 1
            for rank, steps in enumerate(self.schedule.ranks):
                computed += steps[index].tiles
                for kind in kinds:
                    for tile in steps[index].tiles:
                        here[rank][Item(kind, tile.k if kind == "dkv" else tile.q, tile.heads)].append(tile)
                foreign = held[rank][index] + arriving[rank] + sum(item.chunk.owner != rank for item in here[rank])
                if foreign > self.schedule.buffers:
                    self.fail(f"rank {rank} holds {foreign} foreign items, promised are {self.schedule.buffers}", index)
            for target, item, content in due.pop(index, []):
                arriving[target] -= 1
                here[target][item] += content
        done: dict[str, list[Tile]] = {kind: [] for kind in kinds}
        for rank, sums in enumerate(here):
            for item, content in sums.items():
                if item.chunk.owner != rank:
                    self.fail(f"{item} ends on rank {rank}")
                done[item.kind] += content
        for kind, content in done.items():
            if Counter(content) != Counter(computed):
                self.fail(f"{kind}: what is computed and what arrives differ")
        return computed
