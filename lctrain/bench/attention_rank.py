"""What each rank of a sequence-parallel contender does."""

from __future__ import annotations

import torch.distributed as dist

from lctrain.bench.attention_problem import Pass, Problem, measure
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.group import RankGroup
from lctrain.parallel.strategy import Strategy


def run_rank(rank: int, world_size: int, problem: Problem, strategy: Strategy, want_results: bool) -> Pass:
    """One pass over this rank's shard; collective over the default process group."""
    layout, mask, group = problem.layout(world_size), problem.mask, RankGroup(dist.group.WORLD)
    q, k, v, dout = (layout.shard(x, rank, dim=1) for x in problem.inputs())

    def attend(q, k, v):
        return sequence_parallel_attention(q, k, v, layout=layout, mask=mask, group=group, strategy=strategy, need_lse=False)[0]

    return measure(attend, (q, k, v, dout), want_results, dist.barrier, group.sent)
