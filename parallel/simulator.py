"""The simulator: a strategy's steps on a cluster become a timeline.

Each rank walks through its steps as the executor does. At the start of a step its sends and receives are posted and its kernel
calls begin; the step ends when the calls are done and every transfer that is due in it has arrived. Where the host looks after
tensors itself, exchanges take a fixed time on top of the calls. A transfer moves once both sides have posted it and the
link's latency has passed; all that one rank sends to another from the same step to the same step is one message. Messages
share ports, cards and cores as lctrain.parallel.sharing says. Not modelled: what communication takes from a GPU's own units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from lctrain.parallel.cost import CostedStep, costed_steps
from lctrain.parallel.device import Device
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.schedule import Direction
from lctrain.parallel.sharing import Activity, SharedTime
from lctrain.parallel.strategy import Strategy
from lctrain.parallel.topology import Machine, Topology


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What a schedule is simulated on."""

    name: str
    device: Device
    topology: Topology


class Computed(NamedTuple):
    """A rank's kernel calls of one step, with the step's fixed costs, in seconds from the start."""

    rank: int
    step: int
    start: float
    end: float


class Moved(NamedTuple):
    """One message, from its first byte to its last; posted: when both sides were ready."""

    kinds: tuple[str, ...]
    source: int
    target: int
    step: int
    bytes: int
    posted: float
    start: float
    end: float


class Waited(NamedTuple):
    """A rank at the end of a step with its calls done. exposed: seconds of it in which something it waits for was moving (or
    its latency passing); during the rest it waited for a peer that was not ready."""

    rank: int
    step: int
    start: float
    end: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class RankTime:
    """Where a rank's time goes, in seconds; they add up to the timeline's."""

    compute: float
    exposed: float
    idle: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What happens when, in seconds from the start of one direction of one attention layer."""

    world_size: int
    seconds: float
    computed: tuple[Computed, ...]
    moved: tuple[Moved, ...]
    waited: tuple[Waited, ...]

    def ranks(self) -> tuple[RankTime, ...]:
        """Compute, exposed communication and idleness of every rank."""
        compute, exposed = [0.0] * self.world_size, [0.0] * self.world_size
        for work in self.computed:
            compute[work.rank] += work.end - work.start
        for wait in self.waited:
            exposed[wait.rank] += wait.exposed
        return tuple(RankTime(c, e, max(0.0, self.seconds - c - e)) for c, e in zip(compute, exposed, strict=True))


def simulate(
    strategy: Strategy,
    layout: SequenceLayout,
    mask: AttentionMask,
    shape: AttentionShape,
    direction: Direction,
    cluster: Cluster,
) -> Timeline:
    """One direction of one attention layer; all ranks start together."""
    steps = costed_steps(strategy, layout, mask, shape, direction)
    return Simulation(steps, busy_seconds(steps, layout, shape, direction, cluster), cluster.topology).run()


def busy_seconds(
    steps: Sequence[Sequence[CostedStep]], layout: SequenceLayout, shape: AttentionShape, direction: Direction, cluster: Cluster
) -> list[list[float]]:
    """Per rank and step, what keeps the rank busy: its kernel calls, its tensors, and the pass as a whole."""
    device = cluster.device
    queries = layout.local_length * shape.batch * shape.n_heads * shape.head_dim * shape.dtype.itemsize
    seconds = [[sum(device.seconds(call, direction, shape.head_dim) for call in step.calls) for step in own] for own in steps]
    for rank, own in enumerate(steps):
        if own:
            seconds[rank][0] += device.pass_s + device.pass_s_per_byte * queries
        for index, step in enumerate(own):
            for send in step.sends:
                for end in (rank, send.peer):
                    seconds[end][index] += send.tensors * cluster.topology.cpu_s_per_message
    for rank, index, _ in exchanges(steps):
        seconds[rank][index] += cluster.topology.cpu_s_per_exchange
    return seconds


def exchanges(steps: Sequence[Sequence[CostedStep]]) -> set[tuple[int, int, int]]:
    """(rank, step, step at whose end it is waited for) of everything that ranks send and receive together."""
    return {
        (end, index, send.until)
        for rank, own in enumerate(steps)
        for index, step in enumerate(own)
        for send in step.sends
        for end in (rank, send.peer)
    }


def layer_seconds(
    strategy: Strategy, layout: SequenceLayout, mask: AttentionMask, shape: AttentionShape, cluster: Cluster
) -> float:
    """Forward and backward of one attention layer, each from all ranks' common start to the last one's end."""
    return sum(simulate(strategy, layout, mask, shape, way, cluster).seconds for way in ("forward", "backward"))


@dataclasses.dataclass
class _Message:
    """A message under way: its two sides, and when it was posted, started and done."""

    source: int
    target: int
    step: int
    until: int
    kinds: tuple[str, ...] = ()
    bytes: int = 0
    waiting_for: int = 2
    posted: float = 0.0
    start: float = 0.0
    end: float | None = None


class Simulation:
    """All ranks' walk through their steps; `seconds`: per rank and step, for how long it is busy."""

    def __init__(self, steps: Sequence[Sequence[CostedStep]], seconds: Sequence[Sequence[float]], topology: Topology) -> None:
        self.time, self.machine = SharedTime(), Machine(topology, len(steps))
        self.seconds, self.last = seconds, [len(own) - 1 for own in steps]
        self.at, self.busy, self.since = [-1] * len(steps), [False] * len(steps), [0.0] * len(steps)
        self.posts: dict[tuple[int, int], list[_Message]] = {}
        self.due: dict[tuple[int, int], list[_Message]] = {}
        self.pending: dict[tuple[int, int], int] = {}
        self.messages = _messages(steps)
        for message in self.messages:
            for rank in (message.source, message.target):
                self.posts.setdefault((rank, message.step), []).append(message)
                self.due.setdefault((rank, message.until), []).append(message)
                self.pending[rank, message.until] = self.pending.get((rank, message.until), 0) + 1
        self.computed: list[Computed] = []
        self.waited: list[Waited] = []

    def run(self) -> Timeline:
        """From a common start to the last rank's end."""
        for rank, last in enumerate(self.last):
            if last >= 0:
                self._enter(rank, 0)
        self.time.run()
        assert all(at > last for at, last in zip(self.at, self.last, strict=True)), "checked schedules cannot deadlock"
        moved = tuple(
            Moved(m.kinds, m.source, m.target, m.step, m.bytes, m.posted, m.start, m.end or 0.0) for m in self.messages
        )
        return Timeline(len(self.at), self.time.now, tuple(self.computed), moved, tuple(self.waited))

    def _enter(self, rank: int, step: int) -> None:
        """Post the step's transfers and start its calls."""
        self.at[rank], self.busy[rank], self.since[rank] = step, True, self.time.now
        if step > self.last[rank]:
            return
        for message in self.posts.get((rank, step), ()):
            message.waiting_for -= 1
            if not message.waiting_for:
                message.posted = self.time.now
                latency = self.machine.topology.link(message.source, message.target).latency
                self.time.start(Activity(latency, {}, partial(self._move, message)))
        work = self.seconds[rank][step]
        self.time.start(Activity(work, self.machine.computation(rank) if work else {}, lambda: self._computed(rank, step)))

    def _move(self, message: _Message) -> None:
        message.start = self.time.now
        weights = self.machine.message(message.source, message.target)
        self.time.start(Activity(message.bytes, weights, lambda: self._arrived(message)))

    def _computed(self, rank: int, step: int) -> None:
        if self.seconds[rank][step]:
            self.computed.append(Computed(rank, step, self.since[rank], self.time.now))
        self.busy[rank], self.since[rank] = False, self.time.now
        self._leave_if_done(rank)

    def _arrived(self, message: _Message) -> None:
        message.end = self.time.now
        for rank in (message.source, message.target):
            self.pending[rank, message.until] -= 1
            self._leave_if_done(rank)

    def _leave_if_done(self, rank: int) -> None:
        step = self.at[rank]
        if self.busy[rank] or step > self.last[rank] or self.pending.get((rank, step), 0):
            return
        start, end = self.since[rank], self.time.now
        if end > start:
            spans = [(max(start, m.posted), m.end or end) for m in self.due.get((rank, step), ())]
            self.waited.append(Waited(rank, step, start, end, _covered(spans, start)))
        self._enter(rank, step + 1)


def _messages(steps: Sequence[Sequence[CostedStep]]) -> list[_Message]:
    found: dict[tuple[int, int, int, int], _Message] = {}
    for rank, own in enumerate(steps):
        for index, step in enumerate(own):
            for send in step.sends:
                key = (rank, send.peer, index, send.until)
                message = found.setdefault(key, _Message(*key))
                message.bytes += send.bytes
                if send.kind not in message.kinds:
                    message.kinds += (send.kind,)
    return list(found.values())


def _covered(spans: list[tuple[float, float]], start: float) -> float:
    """Length of the union of some spans, from `start` on."""
    total, reached = 0.0, start
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
