"""The courier: carries a schedule's items between ranks and keeps what other ranks' tiles and results need here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.kernels.attention.merge import merge_
from lctrain.parallel.group import RankGroup
from lctrain.parallel.payload import AttentionShape, Part, payload
from lctrain.parallel.plan import AttentionPlan, Side
from lctrain.parallel.schedule import COPIES, Chunk, Item

Tensors = tuple[Tensor, ...]


class _Flight(NamedTuple):
    """Transfers under way: their handles, sent tensors that must stay alive, and sums to add on arrival."""

    handles: list[dist.Work]
    alive: list[Tensors]
    sums: list[tuple[Item, Tensors]]


class _Held(NamedTuple):
    """Copies of neighbouring chunks of one owner in one buffer; `start` is the local index of its first token."""

    tensors: Tensors
    start: int


class Courier:
    """One rank's items on their way through one schedule.

    pack: makes the tensors of one of this rank's own copies. fold: takes results for one of this rank's own chunks.
    """

    def __init__(
        self,
        plan: AttentionPlan,
        group: RankGroup,
        shape: AttentionShape,
        pack: Callable[[Item], Tensors],
        fold: Callable[[Item, Tensors], None],
        device: torch.device,
    ) -> None:
        self._plan, self._group, self._shape, self._device = plan, group, shape, device
        self._pack, self._fold = pack, fold
        self._split = shape.split(plan.slices)
        self._size = plan.placement.chunk_length
        self._copies: dict[Item, Tensors] = {}
        self._held: dict[Item, _Held] = {}
        self._sums: dict[Item, Tensors] = {}
        self._due: dict[int, list[_Flight]] = defaultdict(list)

    def start(self, index: int) -> None:
        """Post all sends and receives of a step."""
        step = self._plan.steps[index].step
        for until in sorted({t.until for t in (*step.sends, *step.receives)}):
            sends, alive = [], []
            for t in step.sends:
                if t.until == until:
                    tensors = self._outgoing(t.item)
                    alive.append(tensors)
                    sends += [(t.item.kind, tensor, t.peer) for tensor in tensors]
            arriving = [(t, t.item) for t in step.receives if t.until == until]
            buffers = self._buffers([item for _, item in arriving if item.kind in COPIES])
            sums = []
            receives = []
            for t, item in arriving:
                tensors = buffers[item] if item.kind in COPIES else self._empty(item, self._size)
                if item.kind not in COPIES:
                    sums.append((item, tensors))
                receives += [(tensor, t.peer) for tensor in tensors]
            self._due[until].append(_Flight(self._group.exchange(sends, receives), alive, sums))

    def finish(self, index: int) -> None:
        """Wait for what is due in a step, pass sums on to where they belong, forget copies that nobody needs any more."""
        for flight in self._due.pop(index, []):
            self._group.wait(flight.handles)
            for item, tensors in flight.sums:
                self._collect(item, tensors)
        for item in self._plan.steps[index].drops:
            self._copies.pop(item, None)
            self._held.pop(item, None)
        if index == len(self._plan.steps) - 1:
            assert not self._sums
            assert not self._due, "the checker proved that everything arrives and every result goes home"

    def copy(self, kind: str, side: Side, heads: int) -> tuple[Tensors, int]:
        """The buffer that holds the copies of some chunks of another rank, and the local index of its first token."""
        return self._held[Item(kind, Chunk(side.owner, side.parts[0]), heads)]

    def add(self, kind: str, side: Side, heads: int, joint: Tensors, start: int) -> None:
        """Keep partial results for some chunks of another rank, found in tensors [tokens, ...] from local index `start` on."""
        for part in side.parts:
            at = slice(part * self._size - start, (part + 1) * self._size - start)
            self._collect(Item(kind, Chunk(side.owner, part), heads), tuple(tensor[at] for tensor in joint))

    def _collect(self, item: Item, tensors: Tensors) -> None:
        if item.chunk.owner == self._plan.rank:
            self._fold(item, tensors)
        elif item in self._sums:
            _add(item.kind, self._sums[item], tensors)
        else:
            self._sums[item] = tensors

    def _outgoing(self, item: Item) -> Tensors:
        if item.kind not in COPIES:
            pairs = zip(self._sums.pop(item), self._parts(item), strict=True)
            return tuple(tensor.to(part.dtype).contiguous() for tensor, part in pairs)
        if item not in self._copies:
            assert item.chunk.owner == self._plan.rank
            self._copies[item] = self._pack(item)
        return self._copies[item]

    def _buffers(self, items: list[Item]) -> dict[Item, Tensors]:
        """One buffer for all arriving chunks of an owner, so that neighbours can go through one kernel call."""
        owners: dict[tuple[str, int, int], list[Item]] = defaultdict(list)
        for item in items:
            owners[item.kind, item.chunk.owner, item.heads].append(item)
        for group in owners.values():
            first, last = (pick(item.chunk.part for item in group) for pick in (min, max))
            held = _Held(self._empty(group[0], (last - first + 1) * self._size), first * self._size)
            for item in group:
                at = slice((item.chunk.part - first) * self._size, (item.chunk.part - first + 1) * self._size)
                self._held[item] = held
                self._copies[item] = tuple(tensor[at] for tensor in held.tensors)
        return {item: self._copies[item] for item in items}

    def _empty(self, item: Item, tokens: int) -> Tensors:
        # Chunks between those that come are never filled; a latent is expanded with them, and NaN there would spread.
        make = torch.empty if self._shape.latent is None else torch.zeros
        return tuple(make(tokens, *part.tail, dtype=part.dtype, device=self._device) for part in self._parts(item))

    def _parts(self, item: Item) -> tuple[Part, ...]:
        return payload(item.kind, self._plan.direction, self._shape, self._split, item.heads, self._plan.rounded)


def _add(kind: str, total: Tensors, more: Tensors) -> None:
    if kind == "out":
        out, lse = total
        merge_(out.transpose(0, 1), lse.permute(1, 2, 0), more[0].transpose(0, 1), more[1].permute(1, 2, 0))
    else:
        for mine, other in zip(total, more, strict=True):
            mine += other
