"""The checker: right schedules made wrong in every way we can think of are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lctrain.parallel.checker import ScheduleError, check
from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.schedule import COPIES, SUMS, Chunk, Item, Schedule, Step, Tile, TileMap, Transfer
from lctrain.parallel.strategies import STRATEGIES, Problem

Draw = Callable[[st.SearchStrategy], object]


class Draft:
    """A schedule that can be changed in place."""

    def __init__(self, schedule: Schedule, tiles: TileMap) -> None:
        self.old, self.tiles = schedule, tiles
        self.ranks = [[[list(part) for part in (s.tiles, s.sends, s.receives)] for s in steps] for steps in schedule.ranks]

    def schedule(self, **changes: int) -> Schedule:
        ranks = tuple(tuple(Step(*map(tuple, step)) for step in steps) for steps in self.ranks)
        return dataclasses.replace(self.old, ranks=ranks, **changes)

    def each(self, what: int) -> list[tuple[int, int, object]]:
        """(rank, step, entry) for all tiles (0) or sends (1)."""
        return [(r, s, entry) for r, steps in enumerate(self.ranks) for s, step in enumerate(steps) for entry in step[what]]

    def add(self, rank: int, step: int, sent: Transfer) -> None:
        self.ranks[rank][step][1].append(sent)
        self.ranks[sent.peer][step][2].append(Transfer(sent.item, rank, sent.until))

    def remove(self, rank: int, step: int, sent: Transfer) -> None:
        self.ranks[rank][step][1].remove(sent)
        self.ranks[sent.peer][step][2].remove(Transfer(sent.item, rank, sent.until))

    def uses(self, rank: int, item: Item) -> Iterator[int]:
        """Steps in which a rank needs a copy."""
        for index, (tiles, sends, _) in enumerate(self.ranks[rank]):
            needed = [x for t in tiles for x in (Item("q", t.q, t.heads), Item("kv", t.k, t.heads))]
            if item in needed or any(t.item == item for t in sends):
                yield index

    def arrives(self, rank: int, item: Item) -> int:
        """Step from which on a rank has a copy."""
        own = item.chunk.owner == rank
        return 0 if own else next(t.until + 1 for _, _, receives in self.ranks[rank] for t in receives if t.item == item)


def a_tile(draft: Draft, draw: Draw) -> tuple[int, int, Tile]:
    tiles = draft.each(0)
    assume(tiles)
    return draw(st.sampled_from(tiles))


def a_send(draft: Draft, draw: Draw, kinds: tuple[str, ...] = COPIES + SUMS) -> tuple[int, int, Transfer]:
    sends = [entry for entry in draft.each(1) if entry[2].item.kind in kinds]
    assume(sends)
    return draw(st.sampled_from(sends))


def drop_tile(draft: Draft, draw: Draw) -> None:
    rank, step, tile = a_tile(draft, draw)
    draft.ranks[rank][step][0].remove(tile)


def duplicate_tile(draft: Draft, draw: Draw) -> None:
    rank, _, tile = a_tile(draft, draw)
    draft.ranks[rank][-1][0].append(tile)


def tile_on_another_rank(draft: Draft, draw: Draw) -> None:
    rank, step, tile = a_tile(draft, draw)
    other = draw(st.integers(0, len(draft.ranks) - 1))
    assume(other != rank)
    draft.ranks[rank][step][0].remove(tile)
    draft.ranks[other][step][0].append(tile)


def dead_tile(draft: Draft, draw: Draw) -> None:
    rank = draw(st.integers(0, len(draft.ranks) - 1))
    own = draft.tiles.chunks_of(rank)
    dead = [Tile(q, k) for q in own for k in own if not draft.tiles.tiles((q,), (k,))]
    assume(dead)
    draft.ranks[rank][0][0].append(dead[0])


def tile_of_unknown_heads(draft: Draft, draw: Draw) -> None:
    rank, step, tile = a_tile(draft, draw)
    draft.ranks[rank][step][0].append(tile._replace(heads=draft.old.slices))


def drop_send(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw)
    draft.ranks[rank][step][1].remove(sent)


def drop_receive(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw)
    draft.ranks[sent.peer][step][2].remove(Transfer(sent.item, rank, sent.until))


def drop_transfer(draft: Draft, draw: Draw) -> None:
    draft.remove(*a_send(draft, draw))


def drop_last_return(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw, SUMS)
    assume(sent.peer == sent.item.chunk.owner)
    draft.remove(rank, step, sent)


def duplicate_transfer(draft: Draft, draw: Draw) -> None:
    draft.add(*a_send(draft, draw))


def send_again_later(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw, COPIES)
    again = draw(st.integers(step, len(draft.ranks[0]) - 1))
    draft.add(rank, again, sent._replace(until=again if again > step else sent.until))


def redirect_send(draft: Draft, draw: Draw) -> None:
    """To a rank that has no business with the item."""
    rank, step, sent = a_send(draft, draw)
    involved = {rank, sent.peer, sent.item.chunk.owner} | {r for r, _, t in draft.each(1) if t.item == sent.item}
    others = sorted(set(range(len(draft.ranks))) - involved)
    assume(others)
    draft.remove(rank, step, sent)
    draft.add(rank, step, sent._replace(peer=draw(st.sampled_from(others))))


def send_to_itself(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw)
    draft.remove(rank, step, sent)
    draft.add(rank, step, sent._replace(peer=rank))


def another_owner(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw)
    chunk = Chunk((sent.item.chunk.owner + 1) % len(draft.ranks), sent.item.chunk.part)
    draft.remove(rank, step, sent)
    draft.add(rank, step, sent._replace(item=sent.item._replace(chunk=chunk)))


def unknown_kind(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw)
    draft.remove(rank, step, sent)
    draft.add(rank, step, sent._replace(item=sent.item._replace(kind="mail")))


def send_before_arrival(draft: Draft, draw: Draw) -> None:
    """One step earlier, where the sender has yet to receive it."""
    rank, step, sent = a_send(draft, draw, COPIES)
    assume(step > 0)
    assume(draft.arrives(rank, sent.item) == step)
    draft.remove(rank, step, sent)
    draft.add(rank, step - 1, sent._replace(until=sent.until - 1))


def send_before_computed(draft: Draft, draw: Draw) -> None:
    """Partial results one step earlier: those of the step before are not in them."""
    rank, step, sent = a_send(draft, draw, SUMS)
    assume(step > 0)
    kind, chunk, heads = sent.item
    tiles = draft.ranks[rank][step - 1][0]
    assume(any((tile.k if kind == "dkv" else tile.q, tile.heads) == (chunk, heads) for tile in tiles))
    draft.remove(rank, step, sent)
    draft.add(rank, step - 1, sent)


def send_too_late(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw, COPIES)
    assume(step + 1 < len(draft.ranks[0]))
    assume(min(draft.uses(sent.peer, sent.item)) == sent.until + 1)
    draft.remove(rank, step, sent)
    draft.add(rank, step + 1, sent._replace(until=min(sent.until + 1, len(draft.ranks[0]) - 1)))


def due_too_late(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw, COPIES)
    assume(sent.until + 1 < len(draft.ranks[0]))
    assume(min(draft.uses(sent.peer, sent.item)) == sent.until + 1)
    draft.remove(rank, step, sent)
    draft.add(rank, step, sent._replace(until=sent.until + 1))


def due_on_one_side(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw)
    draft.ranks[rank][step][1].remove(sent)
    draft.ranks[rank][step][1].append(sent._replace(until=sent.until + 1))


def due_never(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw)
    draft.remove(rank, step, sent)
    draft.add(rank, step, sent._replace(until=len(draft.ranks[0])))


def due_before_sent(draft: Draft, draw: Draw) -> None:
    rank, step, sent = a_send(draft, draw)
    draft.remove(rank, step, sent)
    draft.add(rank, step, sent._replace(until=step - 1))


def one_step_short(draft: Draft, draw: Draw) -> None:
    assume(len(draft.ranks) > 1)
    rank = draw(st.integers(0, len(draft.ranks) - 1))
    assume(len(draft.ranks[rank]) > 1)
    del draft.ranks[rank][draw(st.integers(0, len(draft.ranks[rank]) - 1))]


def useless_copy(draft: Draft, draw: Draw) -> None:
    """A chunk that the receiver has no tile for; a buffer more is promised, so that this alone is wrong."""
    world = len(draft.ranks)
    kind = draw(st.sampled_from(COPIES))
    pairs = [(a, b) for a in range(world) for b in range(world) if a != b]
    free = [(a, b) for a, b in pairs if not any(t.item == Item(kind, Chunk(a, 0)) for _, _, ts in draft.ranks[b] for t in ts)]
    assume(free)
    source, target = draw(st.sampled_from(free))
    draft.add(source, 0, Transfer(Item(kind, Chunk(source, 0)), target, 0))


MUTATIONS = [
    drop_tile,
    duplicate_tile,
    tile_on_another_rank,
    dead_tile,
    tile_of_unknown_heads,
    drop_send,
    drop_receive,
    drop_transfer,
    drop_last_return,
    duplicate_transfer,
    send_again_later,
    redirect_send,
    send_to_itself,
    another_owner,
    unknown_kind,
    send_before_arrival,
    send_before_computed,
    send_too_late,
    due_too_late,
    due_on_one_side,
    due_never,
    due_before_sent,
    one_step_short,
    useless_copy,
]


@st.composite
def right_schedules(draw: st.DrawFn) -> tuple[Schedule, TileMap]:
    world = draw(st.integers(3, 6))  # with fewer ranks many mutations have nowhere to go
    length = draw(st.integers(8, 60))
    ends = draw(st.sets(st.integers(1, length), max_size=3)) | {length}
    mask = AttentionMask(((0, *sorted(ends)),), draw(st.booleans()), draw(st.none() | st.integers(2, 40)))
    tiles = TileMap(SequenceLayout(draw(st.sampled_from(KINDS)), world, length), mask)
    node = draw(st.sampled_from([n for n in range(1, world + 1) if world % n == 0]))
    problem = Problem(tiles, draw(st.sampled_from(("forward", "backward"))), draw(st.integers(1, 4)), node)
    schedule = STRATEGIES[draw(st.sampled_from(sorted(STRATEGIES)))](problem)
    check(schedule, tiles)
    return schedule, tiles


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(right=right_schedules(), data=st.data())
def test_refuses(mutate: Callable[[Draft, Draw], None], right: tuple[Schedule, TileMap], data: st.DataObject) -> None:
    draft = Draft(*right)
    mutate(draft, data.draw)
    generous = draft.old.buffers + 1  # so that the error is not just one item too many
    with pytest.raises(ScheduleError):
        check(draft.schedule(buffers=generous), draft.tiles)


@settings(max_examples=50, deadline=None)
@given(right_schedules())
def test_copy_through_the_schedule_is_accepted(right) -> None:
    """The drafts of this file change nothing by themselves."""
    draft = Draft(*right)
    assert draft.schedule() == right[0]
    check(draft.schedule(), right[1])


@settings(max_examples=50, deadline=None)
@given(right_schedules())
def test_refuses_more_items_than_promised(right) -> None:
    schedule, tiles = right
    assume(any(step.receives for steps in schedule.ranks for step in steps))
    fewest = next(n for n in range(schedule.buffers + 1) if _accepts(dataclasses.replace(schedule, buffers=n), tiles))
    assert 0 < fewest <= schedule.buffers
    with pytest.raises(ScheduleError, match=f"promised are {fewest - 1}"):
        check(dataclasses.replace(schedule, buffers=fewest - 1), tiles)


def _accepts(schedule: Schedule, tiles: TileMap) -> bool:
    try:
        check(schedule, tiles)
    except ScheduleError:
        return False
    return True


def test_refuses_another_world_size() -> None:
    three, four = (TileMap(SequenceLayout("zigzag", n, 64), AttentionMask.dense(64)) for n in (3, 4))
    schedule = STRATEGIES["ring"](Problem(three, "forward", 1))
    with pytest.raises(ScheduleError, match="made for 3 ranks"):
        check(schedule, four)


def test_says_what_is_there_twice() -> None:
    tiles = TileMap(SequenceLayout("zigzag", 4, 64), AttentionMask.dense(64))
    draft = Draft(STRATEGIES["ring"](Problem(tiles, "forward", 1)), tiles)
    rank, step, sent = draft.each(1)[0]
    draft.add(rank, step, sent)
    with pytest.raises(ScheduleError, match=r"step 0: .* is sent twice from rank 0 to 3"):
        check(draft.schedule(), draft.tiles)
    draft.remove(rank, step, sent)
    draft.add(rank, step + 1, sent._replace(until=step + 1))
    with pytest.raises(ScheduleError, match=r"step 1: rank \d receives .* which it has"):
        check(draft.schedule(buffers=9), draft.tiles)


def test_says_where() -> None:
    tiles = TileMap(SequenceLayout("zigzag", 4, 64), AttentionMask.dense(64))
    draft = Draft(STRATEGIES["ring"](Problem(tiles, "forward", 1)), tiles)
    draft.remove(*draft.each(1)[0])
    with pytest.raises(ScheduleError, match=r"^ring forward on 4 ranks, step \d+: rank \d uses .* which has not arrived$"):
        check(draft.schedule(), tiles)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_refuses_to_round_gradients_again_and_again(strategy: str) -> None:
    """Keys' gradients go from rank to rank in rings; where each goes straight home, they may be rounded for the way."""
    tiles = TileMap(SequenceLayout("zigzag", 4, 64), AttentionMask.dense(64))
    schedule = STRATEGIES[strategy](Problem(tiles, "backward", 2, 2))
    assert schedule.rounded == (("dkv",) if strategy == "all_gather" else ())
    rounded = dataclasses.replace(schedule, rounded=("dkv",))
    if strategy in ("all_gather", "token_ring"):
        check(rounded, tiles)
        return
    with pytest.raises(ScheduleError, match="which is rounded, to a rank that adds to it"):
        check(rounded, tiles)
