"""What a strategy costs, step by step and rank by rank: score entries to compute and bytes to send.

Derived from the same plans and schedules that are executed, the exchange of heads for sequence included. The counts feed the
simulator, the timeline and the tables; bytes equal what RankGroup counts at run time.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from lctrain.parallel.exchange import Grouped
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape, item_bytes, payload
from lctrain.parallel.plan import AttentionPlan, Work, make_plan
from lctrain.parallel.schedule import Direction
from lctrain.parallel.strategy import Strategy

PRODUCTS = {"forward": 2, "backward": 5}
"""Matrix products per tile: scores and output; in backward scores again, dP, dV, dQ and dK."""


class Call(NamedTuple):
    """One band given to the kernel: its rectangle, its live entries, and for how many batch rows times query heads."""

    rows: int
    columns: int
    entries: int
    heads: int


class Send(NamedTuple):
    """Bytes on their way to a peer from the start of a step, in so many tensors, waited for at the end of step `until`."""

    kind: str
    peer: int
    bytes: int
    until: int
    tensors: int = 1


class CostedStep(NamedTuple):
    """What one rank computes and sends in one step."""

    calls: tuple[Call, ...]
    sends: tuple[Send, ...]

    def flops(self, direction: Direction, head_dim: int) -> int:
        """Multiply-adds x 2 on live entries."""
        return 2 * PRODUCTS[direction] * head_dim * sum(call.entries * call.heads for call in self.calls)


@lru_cache(maxsize=256)
def costed_steps(
    strategy: Strategy, layout: SequenceLayout, mask: AttentionMask, shape: AttentionShape, direction: Direction
) -> tuple[tuple[CostedStep, ...], ...]:
    """Per rank, the steps of one attention layer in one direction; all ranks have equally many."""
    size = strategy.group_size(layout.world_size, shape.n_kv_heads)
    if size == 1:
        return tuple(_of_plan(strategy, layout, mask, shape, direction, rank) for rank in range(layout.world_size))
    grouped = strategy.grouped(layout, shape.n_kv_heads)
    split = shape.split(size)
    ranks: dict[int, tuple[CostedStep, ...]] = {}
    for index, members in enumerate(grouped.groups):
        for me, rank in enumerate(members):
            heads = split.q[me][1] - split.q[me][0]
            kv_heads = split.kv[me][1] - split.kv[me][0] if split.is_uniform(me) else heads
            inner_shape = AttentionShape(shape.batch, heads, kv_heads, shape.head_dim, shape.dtype, shape.latent)
            inner: tuple[CostedStep, ...] = ()
            if heads:
                peers = [other[me] for other in grouped.groups]
                inner = _of_plan(strategy, grouped, mask, inner_shape, direction, index, peers, first=1)
            ranks[rank] = inner
    longest = max(map(len, ranks.values()))
    for members in grouped.groups:
        for me, rank in enumerate(members):
            before, after = _exchange(members, me, layout, shape, size, direction, after_step=longest + 1)
            idle = (CostedStep((), ()),) * (longest - len(ranks[rank]))
            ranks[rank] = (before, *ranks[rank], *idle, after)
    return tuple(ranks[rank] for rank in range(layout.world_size))


def traffic(
    strategy: Strategy, layout: SequenceLayout, mask: AttentionMask, shape: AttentionShape, direction: Direction, rank: int
) -> Counter[str]:
    """Bytes that one rank sends for one attention layer, by kind of item."""
    total: Counter[str] = Counter()
    for step in costed_steps(strategy, layout, mask, shape, direction)[rank]:
        for send in step.sends:
            total[send.kind] += send.bytes
    return total


def _of_plan(
    strategy: Strategy,
    placement: SequenceLayout | Grouped,
    mask: AttentionMask,
    shape: AttentionShape,
    direction: Direction,
    rank: int,
    peers: list[int] | None = None,
    first: int = 0,
) -> tuple[CostedStep, ...]:
    name, node = strategy.schedule_name(), strategy.node_size(placement.world_size)
    plan = make_plan(name, placement, mask, rank, direction, shape.travelling_heads, node)
    split = shape.split(plan.slices)
    steps = []
    for step in plan.steps:
        calls = tuple(call for work in step.work for call in _calls(work, plan, mask, shape))
        sends = tuple(
            Send(
                t.item.kind,
                t.peer if peers is None else peers[t.peer],
                item_bytes(t.item.kind, plan, shape, t.item.heads, plan.placement.chunk_length),
                t.until + first,
                len(payload(t.item.kind, direction, shape, split, t.item.heads)),
            )
            for t in step.step.sends
        )
        steps.append(CostedStep(calls, sends))
    return tuple(steps)


def _calls(work: Work, plan: AttentionPlan, mask: AttentionMask, shape: AttentionShape) -> list[Call]:
    q0, q1 = shape.split(plan.slices).q[work.heads]
    calls = []
    for row0, row1, band in work.bands:
        rows = shape.batch if row1 is None else row1 - row0
        calls.append(Call(band.q1 - band.q0, band.k1 - band.k0, band.entries, rows * (q1 - q0)))
    return calls


def _exchange(
    members: tuple[int, ...],
    me: int,
    layout: SequenceLayout,
    shape: AttentionShape,
    size: int,
    direction: Direction,
    after_step: int,
) -> tuple[CostedStep, CostedStep]:
    """The exchanges before and after the inner attention, as seen by one member."""
    split, chunks = shape.split(size), layout.chunks
    keys = chunks if shape.latent is not None else 2 * chunks  # a latent is one tensor, keys and values are two
    per_entry = layout.local_length * shape.batch * shape.dtype.itemsize
    per_head, per_kv_head = per_entry * shape.head_dim, per_entry * math.prod(shape.kv_size)
    before, after = [], []
    my_q, my_kv = (size * (end - first) for size, (first, end) in ((per_head, split.q[me]), (per_kv_head, split.kv[me])))
    for member, peer in enumerate(members):
        if member == me:
            continue
        (q0, q1), (k0, k1) = split.q[member], split.kv[member]
        its_q, its_kv = per_head * (q1 - q0), per_kv_head * (k1 - k0)
        if direction == "forward":
            before += [("q", peer, its_q, chunks), ("kv", peer, its_kv, keys)]
            after += [("out", peer, my_q, chunks)]
        else:
            before += [("dout", peer, its_q, chunks)]
            after += [("dq", peer, my_q, chunks), ("dkv", peer, my_kv, keys)]
    return (
        CostedStep((), tuple(Send(kind, peer, count, 0, tensors) for kind, peer, count, tensors in before if count)),
        CostedStep((), tuple(Send(kind, peer, count, after_step, tensors) for kind, peer, count, tensors in after if count)),
    )
