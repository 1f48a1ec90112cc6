"""The checker: proves from the data alone that a schedule computes attention, once and on time, and cannot deadlock.

Every schedule passes here before it is first executed. Deadlock is impossible for any order in which ranks run: every send is
matched by a receive that its peer starts in the same step, and a rank starts all transfers of a step before it waits for any.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import NoReturn

from lctrain.parallel.schedule import COPIES, SUMS, Item, Schedule, Tile, TileMap

Message = tuple[int, int, Item, int]
"""Source, target, what, and the step that it is due in."""


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
        self.steps = max(map(len, schedule.ranks), default=0)

    def fail(self, what: str, step: int | None = None) -> NoReturn:
        raise ScheduleError(f"{self.where}{'' if step is None else f', step {step}'}: {what}")

    def run(self) -> None:
        if self.schedule.world_size != self.tiles.world_size:
            self.fail(f"made for {self.schedule.world_size} ranks")
        if any(len(steps) != self.steps for steps in self.schedule.ranks):
            self.fail("ranks disagree on the number of steps")
        self.check_matching()
        held = [self.walk_copies(rank) for rank in range(self.schedule.world_size)]
        computed = self.walk_sums(held)
        if not self.tiles.are_all(computed, self.schedule.slices):
            self.name_wrong_tile(Counter(computed), Counter(self.tiles.every_tile(self.schedule.slices)))

    def name_wrong_tile(self, computed: Counter[Tile], wanted: Counter[Tile]) -> NoReturn:
        for tile in computed | wanted:
            if not wanted[tile]:
                self.fail(f"dead {tile} is computed")
            if computed[tile] != 1:
                self.fail(f"live {tile} is computed {computed[tile]} times, not once")
        raise AssertionError("some tile is wrong, or this would not have been asked for")

    def check_matching(self) -> None:
        """Every transfer appears on both sides, in the same step and due in the same step."""
        kinds = frozenset(COPIES + SUMS)
        for index in range(self.steps):
            ranks = [(rank, steps[index]) for rank, steps in enumerate(self.schedule.ranks)]
            for rank, step in ranks:
                for t in (*step.sends, *step.receives):
                    if t.peer == rank:
                        self.fail(f"rank {rank} exchanges {t.item} with itself", index)
                    if t.item.kind not in kinds:
                        self.fail(f"rank {rank} exchanges {t.item} which is of no known kind", index)
                    if not index <= t.until < self.steps:
                        self.fail(
                            f"rank {rank} waits for {t.item} in step {t.until}, before it starts or after the last", index
                        )
            sent = [(rank, peer, item, until) for rank, step in ranks for item, peer, until in step.sends]
            received = [(peer, rank, item, until) for rank, step in ranks for item, peer, until in step.receives]
            if not len(sent) == len(received) == len(once := set(sent)) or once != set(received):
                self.name_unmatched(Counter(sent), Counter(received), index)

    def name_unmatched(self, sent: Counter[Message], received: Counter[Message], index: int) -> NoReturn:
        for source, target, item, until in sent - received:
            self.fail(f"rank {source} sends {item} and waits in step {until}, which rank {target} does not receive so", index)
        for source, target, item, until in received - sent:
            self.fail(f"rank {target} receives {item} and waits in step {until}, which rank {source} does not send so", index)
        source, target, item, _ = sent.most_common(1)[0][0]
        self.fail(f"{item} is sent twice from rank {source} to {target}", index)

    def walk_copies(self, rank: int) -> list[int]:
        """Copies are there when used or sent on; returns the foreign copies held in each step, from posting to last use."""
        posted: dict[Item, int] = {}
        usable: dict[Item, int] = {}
        last_use: dict[Item, int] = {}
        for index, step in enumerate(self.schedule.ranks[rank]):
            used = {Item("q", q, heads) for q, _, heads in step.tiles if q.owner != rank}
            used.update([Item("kv", k, heads) for _, k, heads in step.tiles if k.owner != rank])
            used.update([t.item for t in step.sends if t.item.kind in COPIES and t.item.chunk.owner != rank])
            for item in used:
                if usable.get(item, self.steps) > index:
                    self.fail(f"rank {rank} uses {item} which has not arrived", index)
                last_use[item] = index
            for t in step.receives:
                if t.item.kind in COPIES:
                    if t.item in posted or t.item.chunk.owner == rank:
                        self.fail(f"rank {rank} receives {t.item} which it has", index)
                    posted[t.item], usable[t.item] = index, t.until + 1
        more = [0] * (self.steps + 1)
        for item, since in posted.items():
            if item not in last_use:
                self.fail(f"rank {rank} receives {item} and never uses it")
            more[since] += 1
            more[last_use[item] + 1] -= 1
        return list(itertools.accumulate(more))

    def walk_sums(self, held: list[list[int]]) -> list[Tile]:
        """Follow partial results home; returns all tiles that were computed, each of which is in the results as often."""
        kinds = ("out",) if self.schedule.direction == "forward" else ("dq", "dkv")
        here: list[dict[Item, list[Tile]]] = [defaultdict(list) for _ in self.schedule.ranks]  # for chunks of others
        done: dict[str, list[Tile]] = {kind: [] for kind in kinds}
        due: dict[int, list[tuple[int, Item, list[Tile]]]] = defaultdict(list)
        arriving = [0] * len(here)
        computed: list[Tile] = []
        for index in range(self.steps):
            for rank, steps in enumerate(self.schedule.ranks):
                for t in steps[index].sends:
                    if t.item.kind in SUMS:
                        if t.item not in here[rank]:
                            self.fail(f"rank {rank} sends {t.item} which it does not have", index)
                        if t.item.kind in self.schedule.rounded and t.peer != t.item.chunk.owner:
                            self.fail(f"rank {rank} sends {t.item} which is rounded, to a rank that adds to it", index)
                        due[t.until].append((t.peer, t.item, here[rank].pop(t.item)))
                        arriving[t.peer] += 1
            for rank, steps in enumerate(self.schedule.ranks):
                computed += steps[index].tiles
                for kind in kinds:
                    for tile in steps[index].tiles:
                        chunk = tile.k if kind == "dkv" else tile.q
                        result = done[kind] if chunk.owner == rank else here[rank][Item(kind, chunk, tile.heads)]
                        result.append(tile)
                foreign = held[rank][index] + arriving[rank] + len(here[rank])
                if foreign > self.schedule.buffers:
                    self.fail(f"rank {rank} holds {foreign} foreign items, promised are {self.schedule.buffers}", index)
            for target, item, content in due.pop(index, []):
                arriving[target] -= 1
                if item.chunk.owner == target:
                    done[item.kind] += content
                else:
                    here[target][item] += content
        for rank, sums in enumerate(here):
            for item in sums:
                self.fail(f"{item} ends on rank {rank}")
        for kind, content in done.items():
            if len(content) != len(computed) or set(content) != set(computed):
                self.fail(f"{kind}: what is computed and what arrives differ")
        return computed
