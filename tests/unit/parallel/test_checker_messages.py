"""What the checker says of each kind of fault, so that whoever writes a strategy finds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from lctrain.parallel.checker import ScheduleError, check
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.schedule import Chunk, Item, Schedule, Step, Tile, TileMap, Transfer
from lctrain.parallel.strategies import STRATEGIES, Problem

TILES = TileMap(SequenceLayout("zigzag", 4, 64), AttentionMask.dense(64))
Steps = list[list[Step]]


def drop_a_tile(steps: Steps) -> None:
    change(steps, 0, 1, tiles=steps[0][1].tiles[1:])


def compute_a_tile_twice(steps: Steps) -> None:
    change(steps, 0, 1, tiles=steps[0][1].tiles + steps[0][1].tiles[:1])


def compute_a_dead_tile(steps: Steps) -> None:
    change(steps, 0, 0, tiles=(*steps[0][0].tiles, Tile(Chunk(0, 0), Chunk(0, 1))))


def send_to_another_rank(steps: Steps) -> None:
    change(steps, 1, 0, sends=tuple(sent._replace(peer=2) for sent in steps[1][0].sends))


def send_to_itself(steps: Steps) -> None:
    change(steps, 1, 0, sends=tuple(sent._replace(peer=1) for sent in steps[1][0].sends))


def forget_to_receive(steps: Steps) -> None:
    change(steps, 0, 0, receives=())


def receive_a_step_late(steps: Steps) -> None:
    late = tuple(came._replace(until=1) for came in steps[0][0].receives)
    change(steps, 0, 1, receives=steps[0][1].receives + late)
    change(steps, 0, 0, receives=())


def wait_in_the_past(steps: Steps) -> None:
    change(steps, 1, 1, sends=tuple(sent._replace(until=0) for sent in steps[1][1].sends))


def swap_steps_of_a_rank(steps: Steps) -> None:
    steps[1][1], steps[1][2] = steps[1][2], steps[1][1]


def compute_before_arrival(steps: Steps) -> None:
    for step, tiles in ((0, steps[0][0].tiles + steps[0][1].tiles), (1, ())):
        change(steps, 0, step, tiles=tiles)


def bring_a_result_to_another_rank(steps: Steps) -> None:
    """In token_ring, out of rank 2's queries goes from rank 1 to rank 3."""
    at, sent = next((i, t) for i, step in enumerate(steps[1]) for t in step.sends if t.item.kind == "out" and t.peer == 2)
    change(steps, 1, at, sends=tuple(t._replace(peer=3) if t == sent else t for t in steps[1][at].sends))
    came = Transfer(sent.item, 1, sent.until)
    change(steps, 2, at, receives=tuple(t for t in steps[2][at].receives if t != came))
    change(steps, 3, at, receives=(*steps[3][at].receives, came))


def end_early(steps: Steps) -> None:
    steps[2].pop()


def have_no_ranks(steps: Steps) -> None:
    steps.clear()


def receive_what_nobody_needs(steps: Steps) -> None:
    item = Item("kv", Chunk(3, 1))
    change(steps, 3, 0, sends=(*steps[3][0].sends, Transfer(item, 0, 0)))
    change(steps, 0, 0, receives=(*steps[0][0].receives, Transfer(item, 3, 0)))


def change(steps: Steps, rank: int, step: int, **parts: tuple) -> None:
    steps[rank][step] = dataclasses.replace(steps[rank][step], **parts)


FAULTS: list[tuple[str, Callable[[Steps], None], str]] = [
    ("ring", drop_a_tile, "live tile of queries chunk . of rank 0 and keys chunk 0 of rank 1, heads 0 is computed 0 times"),
    ("ring", compute_a_tile_twice, "live tile of .* is computed 2 times, not once"),
    ("ring", compute_a_dead_tile, "dead tile of queries chunk 0 of rank 0 and keys chunk 1 of rank 0, heads 0 is computed"),
    ("ring", send_to_another_rank, "step 0: rank 1 sends kv of chunk . of rank 1, heads 0, .* rank 2 does not receive so"),
    ("ring", send_to_itself, "step 0: rank 1 exchanges kv of chunk . of rank 1, heads 0, with itself"),
    ("ring", forget_to_receive, "step 0: rank 1 sends kv .* which rank 0 does not receive so"),
    ("ring", receive_a_step_late, "step 0: rank 1 sends kv .* which rank 0 does not receive so"),
    ("ring", wait_in_the_past, "step 1: rank 1 waits for kv .* in step 0, before it starts or after the last"),
    ("ring", swap_steps_of_a_rank, r"step \d: rank \d (sends|waits)"),
    ("ring", compute_before_arrival, "step 0: rank 0 uses kv of chunk . of rank 1, heads 0, which has not arrived"),
    ("token_ring", bring_a_result_to_another_rank, "out of chunk . of rank 2, heads 0, ends on rank 3"),
    ("ring", end_early, "ranks disagree on the number of steps"),
    ("ring", have_no_ranks, "made for 0 ranks"),
    ("token_ring", receive_what_nobody_needs, "rank 0 receives kv of chunk 1 of rank 3, heads 0, and never uses it"),
]


@pytest.mark.parametrize(("strategy", "fault", "said"), FAULTS, ids=[fault.__name__ for _, fault, _ in FAULTS])
def test_a_planted_fault_is_named(strategy: str, fault: Callable[[Steps], None], said: str) -> None:
    right = STRATEGIES[strategy](Problem(TILES, "forward", 1))
    check(right, TILES)
    steps = [list(own) for own in right.ranks]
    fault(steps)
    with pytest.raises(ScheduleError, match=f"^{strategy} forward on 4 ranks(, |: ).*{said}") as caught:
        check(_of(right, steps), TILES)
    assert "Chunk(" not in str(caught.value)


def test_a_promise_of_too_few_buffers_is_named() -> None:
    right = STRATEGIES["ring"](Problem(TILES, "forward", 1))
    with pytest.raises(ScheduleError, match="step 0: rank 0 holds 2 foreign items, promised are 1"):
        check(dataclasses.replace(right, buffers=1), TILES)


def _of(schedule: Schedule, steps: Steps) -> Schedule:
    return dataclasses.replace(schedule, ranks=tuple(map(tuple, steps)), buffers=schedule.buffers + 1)
