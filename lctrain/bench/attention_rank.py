"""What each rank of a sequence-parallel contender does."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor

from lctrain.bench.attention_problem import Pass, Problem, Timing, measure, timed
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.group import RankGroup
from lctrain.parallel.strategy import Strategy


class _Rank:
    """One rank's shard, and attention over it."""

    def __init__(self, rank: int, world_size: int, problem: Problem, strategy: Strategy) -> None:
        layout, self.group = problem.layout(world_size), RankGroup(dist.group.WORLD)
        q, k, v, self.dout = (layout.shard(x, rank, dim=1) for x in problem.inputs())
        self.qkv = q, k, v
        self._attention = partial(
            sequence_parallel_attention, layout=layout, mask=problem.mask, group=self.group, strategy=strategy, need_lse=False
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attention(q, k, v)[0]

    def timed_pass(self) -> tuple[Timing, Timing]:
        q, k, v = (x.detach().requires_grad_() for x in self.qkv)
        out, forward = timed(lambda: self.attend(q, k, v), dist.barrier)
        return forward, timed(lambda: out.backward(self.dout), dist.barrier)[1]


def run_rank(rank: int, world_size: int, problem: Problem, strategy: Strategy, want_results: bool) -> Pass:
    """One pass over this rank's shard; collective over the default process group."""
    one = _Rank(rank, world_size, problem, strategy)
    return measure(one.attend, (*one.qkv, one.dout), want_results, dist.barrier, one.group.sent)


def time_rank(rank: int, world_size: int, problem: Problem, strategy: Strategy) -> tuple[Timing, Timing]:
    """Forward and backward of the second of two passes, which finds memory at hand as one layer does after another."""
    one = _Rank(rank, world_size, problem, strategy)
    one.timed_pass()
    return one.timed_pass()
