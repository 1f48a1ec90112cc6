"""The checker: proves from the data alone that a schedule computes attention, once and on time, and cannot deadlock.

Every schedule passes here before it is first executed. Deadlock is impossible for any order in which ranks run, because
every send of a step meets its receive in the same step, and a step posts all of its transfers before it waits for any.
"""

from __future__ import annotations

from collections import Counter

from lctrain.parallel.schedule import COPIES, SUMS, Chunk, Item, Schedule, Tile, TileMap


class ScheduleError(AssertionError):
    """A schedule is wrong; the message names the rank, the step and what is wrong with it."""


def check(schedule: Schedule, tiles: TileMap) -> None:
    """Raise ScheduleError unless `schedule` is right for `tiles`.

    Each live tile is computed exactly once and no dead one is; tiles find their inputs; sends and receives of a step match;
    sums end with their owner; no rank holds more than schedule.buffers foreign chunks.
    """
    where = f"{schedule.strategy} {schedule.direction} on {tiles.world_size} ranks"
    if schedule.world_size != tiles.world_size:
        raise ScheduleError(f"{where}: made for {schedule.world_size} ranks")
    lengths = {len(steps) for steps in schedule.ranks}
    if len(lengths) != 1:
        raise ScheduleError(f"{where}: ranks disagree on the number of steps: {sorted(lengths)}")
    for index in range(lengths.pop()):
        _check_matching(schedule, index, where)
    holdings = [_walk_copies(schedule, rank, where) for rank in range(schedule.world_size)]
    done = _walk_sums(schedule, holdings, where)
    for tile in tiles.all_live():
        if done[tile] != 1:
            raise ScheduleError(f"{where}: live {tile} is accounted for {done[tile]} times instead of once")
        del done[tile]
    if done:
        raise ScheduleError(f"{where}: dead {next(iter(done))} is computed")


def _check_matching(schedule: Schedule, index: int, where: str) -> None:
    sent, received = Counter(), Counter()
    for rank, steps in enumerate(schedule.ranks):
        sent.update((rank, transfer.peer, transfer.item) for transfer in steps[index].sends)
        received.update((transfer.peer, rank, transfer.item) for transfer in steps[index].receives)
    for source, target, item in (sent - received) + (received - sent):
        raise ScheduleError(f"{where}, step {index}: {item} from rank {source} to rank {target} is not both sent and received")
    for (source, target, item), times in sent.items():
        if times > 1 or source == target or item.kind not in COPIES + SUMS:
            raise ScheduleError(f"{where}, step {index}: bad transfer of {item} from rank {source} to rank {target}")


def _walk_copies(schedule: Schedule, rank: int, where: str) -> list[int]:
    """Check that copies are there when used or sent; foreign copies held in each step, from arrival to last use."""
    arrived: dict[Item, int] = {}
    last_use: dict[Item, int] = {}
    for index, step in enumerate(schedule.ranks[rank]):
        used = [Item("kv", tile.k) for tile in step.tiles] + [t.item for t in step.sends if t.item.kind in COPIES]
        for item in used:
            if item.chunk.owner != rank:
                if arrived.get(item, index) >= index:
                    raise ScheduleError(f"{where}, step {index}: rank {rank} uses {item}, which has not arrived")
                last_use[item] = index
        for tile in step.tiles:
            if tile.q.owner != rank:
                raise ScheduleError(f"{where}, step {index}: rank {rank} has no queries for {tile}")
        for transfer in step.receives:
            if transfer.item.kind in COPIES:
                if transfer.item in arrived or transfer.item.chunk.owner == rank:
                    raise ScheduleError(f"{where}, step {index}: rank {rank} receives {transfer.item}, which it has")
                arrived[transfer.item] = index
    for item in arrived.keys() - last_use.keys():
        raise ScheduleError(f"{where}: rank {rank} receives {item} and never uses it")
    held = [0] * len(schedule.ranks[rank])
    for item, since in arrived.items():
        for index in range(since, last_use[item] + 1):
            held[index] += 1
    return held


def _walk_sums(schedule: Schedule, holdings: list[list[int]], where: str) -> Counter[Tile]:
    """Follow partial results to their owners; how often each tile is in the final results."""
    backward = schedule.direction == "backward"
    here: list[dict[Chunk, Counter[Tile]]] = [{} for _ in schedule.ranks]
    computed: Counter[Tile] = Counter()
    for index in range(len(schedule.ranks[0])):
        moving: list[tuple[int, Chunk, Counter[Tile]]] = []
        for rank, steps in enumerate(schedule.ranks):
            for transfer in steps[index].sends:
                if transfer.item.kind in SUMS:
                    content = here[rank].pop(transfer.item.chunk, None)
                    if content is None:
                        raise ScheduleError(f"{where}, step {index}: rank {rank} sends {transfer.item}, which it does not have")
                    moving.append((transfer.peer, transfer.item.chunk, content))
        for rank, steps in enumerate(schedule.ranks):
            for tile in steps[index].tiles:
                computed[tile] += 1
                if backward:
                    here[rank].setdefault(tile.k, Counter())[tile] += 1
            foreign = sum(chunk.owner != rank for chunk in here[rank]) + sum(target == rank for target, _, _ in moving)
            if holdings[rank][index] + foreign > schedule.buffers:
                raise ScheduleError(
                    f"{where}, step {index}: rank {rank} holds {holdings[rank][index] + foreign} foreign chunks,"
                    f" more than the {schedule.buffers} it promises"
                )
        for target, chunk, content in moving:
            here[target].setdefault(chunk, Counter()).update(content)
    if not backward:
        return computed
    done: Counter[Tile] = Counter()
    for rank, sums in enumerate(here):
        for chunk, content in sums.items():
            if chunk.owner != rank:
                raise ScheduleError(f"{where}: gradients of {chunk} end on rank {rank}")
            done.update(content)
    for tile in computed:
        if computed[tile] != done[tile]:
            raise ScheduleError(
                f"{where}: {tile} is computed {computed[tile]} times, but its gradient arrives {done[tile]} times"
            )
    return done
