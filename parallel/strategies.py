"""Strategies: functions from the live tiles of a sharded sequence to a schedule.

ring                Keys and values go from rank to rank, towards lower ranks, one hop a step.
bidirectional_ring  The same in both directions at once, half of the heads each way (with one KV head: half of the chunks).
double_ring         Rings inside nodes, and a ring between nodes whose hops have a whole inner round to arrive (LoongTrain).
token_ring          Queries go round, keys stay; partial outputs return straight to their owner, against the stream (TokenRing).
                    In backward queries, output gradients, log-sum-exp and delta go round and dq returns; dk and dv stay.
all_gather          Every rank sends its keys and values directly to all that need them, in one step.

What no published ring does: a chunk goes only where it is still needed. With the zigzag layout and a causal mask a rank's
second chunk of keys is dead for every rank after the wrap from rank 0 to W-1, so a quarter of the traffic never happens;
windows and document borders trim more. Gradients of travelling keys follow one step behind them and go straight home from the
last rank that adds to them. Where results come home at the end, off-diagonal local tiles come first, to hide the first hop, and
diagonal ones last, to hide the last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

from lctrain.parallel.checker import check
from lctrain.parallel.schedule import Chunk, Direction, Item, Schedule, Step, Tile, TileMap, Transfer

Stop = tuple[int, int]
"""A step and the rank that a travelling item is used on in it."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a strategy is asked for: live tiles, direction, heads; node: ranks per node, for strategies that care."""

    live: TileMap
    direction: Direction
    n_kv_heads: int
    node: int = 1

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.live.world_size

    @property
    def backward(self) -> bool:
        """Whether this is the backward direction."""
        return self.direction == "backward"


_IDLE = Step()


class _Plan:
    """Collects tiles and transfers; a transfer is entered once and appears on both sides."""

    def __init__(self, problem: Problem, steps: int) -> None:
        self.problem, self.last = problem, steps - 1
        world = problem.world_size
        self.tiles: list[list[list[Tile]]] = [[[] for _ in range(steps)] for _ in range(world)]
        self.sends: list[list[list[Transfer]]] = [[[] for _ in range(steps)] for _ in range(world)]
        self.receives: list[list[list[Transfer]]] = [[[] for _ in range(steps)] for _ in range(world)]

    def transfer(self, item: Item, source: int, target: int, step: int, until: int | None = None) -> None:
        due = step if until is None else until
        self.sends[source][step].append(Transfer(item, target, due))
        self.receives[target][step].append(Transfer(item, source, due))

    def local(self, heads: int, split: bool) -> None:
        """A rank's own tiles: all in the first step, or (split) the diagonal ones in the last."""
        live = self.problem.live
        for rank, steps in enumerate(self.tiles):
            own = live.chunks_of(rank)
            for tile in live.tiles(own, own, heads):
                steps[self.last if split and live.whole(tile.q) == live.whole(tile.k) else 0].append(tile)

    def schedule(self, strategy: str, slices: int, buffers: int, rounded: tuple[str, ...] = ()) -> Schedule:
        ranks = []
        for tiles, sends, receives in zip(self.tiles, self.sends, self.receives, strict=True):
            steps = zip(tiles, sends, receives, strict=True)
            ranks.append(
                tuple(Step(tuple(t), tuple(sorted(s)), tuple(sorted(r))) if t or s or r else _IDLE for t, s, r in steps)
            )
        return Schedule(strategy, self.problem.direction, tuple(ranks), slices, buffers, rounded)


@dataclasses.dataclass(frozen=True)
class _Round:
    """One way of going round: where an item of each owner is in each step, and from where it comes there.

    inner: ranks of the inner ring. Within an inner round an item moves on by one rank a step; between rounds it goes to the
    next node, from the rank that used it first in the round, with the whole round for the way. One round is a plain ring.
    sign: -1 towards lower ranks, 1 towards higher.
    """

    world: int
    inner: int
    sign: int = -1

    def rank_at(self, owner: int, step: int) -> int:
        """Rank that uses what `owner` sent round in `step`."""
        node, place = divmod(owner, self.inner)
        outer, turn = divmod(step, self.inner)
        nodes = self.world // self.inner
        return (node + self.sign * outer) % nodes * self.inner + (place + self.sign * turn) % self.inner

    def before(self, step: int) -> int:
        """The step whose user hands the item on for `step`; it does so while it uses it."""
        return step - 1 if step % self.inner else step - self.inner


def _go_round(
    plan: _Plan, way: _Round, moving: Literal["q", "kv"], heads: int = 0, wanted: Callable[[Chunk], bool] = lambda chunk: True
) -> None:
    """Send every wanted chunk of queries or keys round to the ranks that need it, compute there, bring the results home."""
    live, backward = plan.problem.live, plan.problem.backward
    for owner in range(way.world):
        route = [(step, way.rank_at(owner, step)) for step in range(1, way.world)]
        for chunk in filter(wanted, live.chunks_of(owner)):
            visits = live.visits(chunk, moving, heads)
            stops = {step: rank for step, rank in route if rank in visits}
            item = Item(moving, chunk, heads)
            for step, rank in stops.items():
                plan.tiles[rank][step] += visits[rank]
                start = way.before(step)
                plan.transfer(item, stops.get(start, owner), rank, start, until=step - 1)
            result = "dkv" if backward and moving == "kv" else "dq" if backward else "out"
            if moving == "q" or backward:
                _bring_home(plan, way, Item(result, chunk, heads), stops)


def _bring_home(plan: _Plan, way: _Round, item: Item, stops: dict[int, int]) -> None:
    """Sums of keys' gradients go on with the keys while these visit neighbours; everything else returns directly."""
    for step, rank in stops.items():
        travels_on = item.kind == "dkv" and step + 1 in stops and (step + 1) % way.inner
        if travels_on:
            plan.transfer(item, rank, stops[step + 1], step + 1)
        else:
            slack = way.inner if way.inner < way.world else 1  # homeward hops between nodes may take an inner round
            plan.transfer(item, rank, item.chunk.owner, step + 1, until=min(step + slack, plan.last))


def _ring(problem: Problem, name: str = "ring", inner: int | None = None) -> Schedule:
    world = problem.world_size
    plan = _Plan(problem, world + (problem.backward and world > 1))
    plan.local(0, split=problem.backward and world > 1)
    _go_round(plan, _Round(world, inner or world), "kv")
    # Keys in use and arriving, with two rings also those waiting for the next node; in backward gradients growing, arriving to
    # grow further, and coming home (from several nodes, with two rings).
    rings = 1 if inner in (None, world) else 2
    return plan.schedule(name, 1, buffers=(2 * rings + (3 * rings if problem.backward else 0)) * problem.live.chunks)


def _double_ring(problem: Problem) -> Schedule:
    return _ring(problem, "double_ring", problem.node)


def _bidirectional_ring(problem: Problem) -> Schedule:
    world = problem.world_size
    by_heads = problem.n_kv_heads > 1
    slices = 2 if by_heads else 1
    plan = _Plan(problem, world + (problem.backward and world > 1))
    for heads in range(slices):
        plan.local(heads, split=problem.backward and world > 1)
    down, up = _Round(world, world, -1), _Round(world, world, 1)
    if by_heads:
        _go_round(plan, down, "kv", heads=0)
        _go_round(plan, up, "kv", heads=1)
    else:
        _go_round(plan, down, "kv", wanted=lambda chunk: problem.live.whole(chunk) % 2 == 0)
        _go_round(plan, up, "kv", wanted=lambda chunk: problem.live.whole(chunk) % 2 == 1)
    return plan.schedule("bidirectional_ring", slices, buffers=(5 if problem.backward else 2) * slices * problem.live.chunks)


def _token_ring(problem: Problem) -> Schedule:
    world = problem.world_size
    plan = _Plan(problem, world + (world > 1))
    plan.local(0, split=world > 1)
    _go_round(plan, _Round(world, world), "q")
    # Queries in use and arriving; results made, and those of up to every other rank's last step coming home.
    return plan.schedule("token_ring", 1, buffers=4 * problem.live.chunks)


def _all_gather(problem: Problem) -> Schedule:
    live, world, backward = problem.live, problem.world_size, problem.backward
    plan = _Plan(problem, (3 if backward else 2) if world > 1 else 1)
    plan.local(0, split=backward and world > 1)
    for chunk in (chunk for owner in range(world) for chunk in live.chunks_of(owner)):
        for rank, tiles in live.visits(chunk, "kv").items():
            if rank != chunk.owner:
                plan.tiles[rank][1] += tiles
                plan.transfer(Item("kv", chunk), chunk.owner, rank, 0)
                if backward:
                    plan.transfer(Item("dkv", chunk), rank, chunk.owner, 2)
    # Backward: everyone's keys with a gradient each, then everyone's share of this rank's gradients.
    buffers = (2 if backward else 1) * max(1, world - 1) * live.chunks
    return plan.schedule("all_gather", 1, buffers, rounded=("dkv",) if backward else ())


STRATEGIES: dict[str, Callable[[Problem], Schedule]] = {
    "ring": _ring,
    "bidirectional_ring": _bidirectional_ring,
    "double_ring": _double_ring,
    "token_ring": _token_ring,
    "all_gather": _all_gather,
}


def default_node(world_size: int) -> int:
    """Ranks per node where nobody says: the largest divisor up to the square root."""
    return max(n for n in range(1, math.isqrt(world_size) + 1) if world_size % n == 0)


@lru_cache(maxsize=2)  # for those who ask for the plans of all ranks; with 64 of them a schedule is many megabytes
def make_schedule(strategy: str, problem: Problem) -> Schedule:
    """The checked schedule of a strategy; ValueError for an unknown strategy or a node size that does not divide."""
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown attention strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if problem.world_size % problem.node:
        raise ValueError(f"{problem.world_size} ranks are not a multiple of {problem.node} ranks per node")
    schedule = STRATEGIES[strategy](problem)
    check(schedule, problem.live)
    return schedule
