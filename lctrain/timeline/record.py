"""Recording real timelines: a sequence group that notes when its messages are posted and waited for.

Everything between a rank's dealings with the group counts as computing. A message's bar ends when its rank has waited for it,
so it may have arrived earlier: while a rank computes, it does not look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from lctrain.bench.attention_problem import Problem
from lctrain.launch.ranks import RankPool
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.group import RankGroup
from lctrain.parallel.strategy import Strategy
from lctrain.timeline.bars import Bar, Lane, Phase

T = TypeVar("T")
LEAST_S = 2e-5
"""Shorter pauses between two dealings with the group are not computing."""


class RecordingGroup(RankGroup):
    """Times every exchange; `note` gets a bar for each message and each wait."""

    def __init__(self, process_group: dist.ProcessGroup | None, note: list[Bar]) -> None:
        super().__init__(process_group)
        self.note, self.self_rank = note, self.rank

    def across(self, ranks: Sequence[int]) -> RecordingGroup:
        """See RankGroup; what the part does is noted here too."""
        part = RecordingGroup(self.process_group, self.note)
        part.__dict__.update(super().across(ranks).__dict__)
        return part

    def exchange(self, sends: Sequence[tuple[str, Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[dist.Work]:
        """See RankGroup."""
        posted = time.perf_counter()
        handles = super().exchange(sends, receives)
        what: list[tuple[Lane, str, int]] = [("send", kind, self._peers[peer]) for kind, _, peer in sends]
        what += [("receive", "message", self._peers[peer]) for _, peer in receives]
        return [_Noted(self, handle, posted, *one) for handle, one in zip(handles, what, strict=True)]  # type: ignore[misc]


class _Noted:
    """A handle that tells when it has been waited for."""

    def __init__(self, group: RecordingGroup, handle: dist.Work, posted: float, lane: Lane, kind: str, peer: int) -> None:
        self._group, self._handle, self._posted = group, handle, posted
        self._lane: Lane = lane
        self._kind, self._peer = kind, peer

    def wait(self) -> None:
        began = time.perf_counter()
        self._handle.wait()
        ended, rank = time.perf_counter(), self._group.self_rank
        label = f"{self._kind} {'to' if self._lane == 'send' else 'from'} {self._peer}"
        self._group.note.append(Bar(rank, self._lane, self._posted, ended, self._kind, label))
        self._group.note.append(Bar(rank, "compute", began, ended, "wait", "wait"))


def record(pool: RankPool, problem: Problem, strategy: Strategy) -> list[Phase]:
    """The second of two passes over `problem` on the pool's ranks, forward and backward."""
    ranks: list[list[tuple[float, float, list[Bar]]]] = pool.run(_record_rank, problem, strategy, timeout_s=600.0)
    return [_phase(name, list(parts)) for name, parts in zip(("forward", "backward"), zip(*ranks, strict=True), strict=True)]


def _record_rank(rank: int, world_size: int, problem: Problem, strategy: Strategy) -> list[tuple[float, float, list[Bar]]]:
    """(start, end, bars) of each direction, on the clock that all processes of a machine share."""
    layout, note = problem.layout(world_size), list[Bar]()
    group = RecordingGroup(dist.group.WORLD, note)
    q, k, v, dout = (layout.shard(x, rank, dim=1) for x in problem.inputs())

    def timed(action: Callable[[], T]) -> tuple[T, tuple[float, float, list[Bar]]]:
        note.clear()
        dist.barrier()
        start = time.perf_counter()
        result = action()
        end = time.perf_counter()
        return result, (start, end, [*note, *_computing(rank, start, end, note)])

    def one_pass() -> list[tuple[float, float, list[Bar]]]:
        x, y, z = (leaf.detach().requires_grad_() for leaf in (q, k, v))
        (out, _), forward = timed(
            lambda: sequence_parallel_attention(
                x, y, z, layout=layout, mask=problem.mask, group=group, strategy=strategy, need_lse=False
            )
        )
        return [forward, timed(lambda: out.backward(dout))[1]]

    one_pass()
    return one_pass()


def _computing(rank: int, start: float, end: float, note: list[Bar]) -> list[Bar]:
    """The time between waits."""
    bars, at = [], start
    for wait in sorted(bar for bar in note if bar.kind == "wait"):
        if wait.start - at > LEAST_S:
            bars.append(Bar(rank, "compute", at, wait.start, "compute", ""))
        at = max(at, wait.end)
    return [*bars, Bar(rank, "compute", at, end, "compute", "")] if end - at > LEAST_S else bars


def _phase(name: str, ranks: list[tuple[float, float, list[Bar]]]) -> Phase:
    """All ranks' bars, from the first start on."""
    zero = min(start for start, _, _ in ranks)
    bars = tuple(bar._replace(start=bar.start - zero, end=bar.end - zero) for _, _, own in ranks for bar in own)
    return Phase(name, max(end for _, end, _ in ranks) - zero, bars)
