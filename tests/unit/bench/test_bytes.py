"""Bytes counted while ranks ran are those of the schedule, to the byte; and what the schedules save."""

from __future__ import annotations

import pytest
import torch

from lctrain.bench.attention_problem import Problem
from lctrain.bench.attention_rank import run_rank
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.cost import traffic
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.strategy import Strategy

PROBLEMS = {
    "one document": Problem(AttentionShape(1, 4, 4, 8, torch.float32), 65, (0, 65), None, "zigzag", 0),
    "grouped, bf16, batch": Problem(AttentionShape(2, 4, 2, 8, torch.bfloat16), 64, (0, 64), None, "zigzag", 0),
    "window": Problem(AttentionShape(1, 4, 1, 8, torch.float32), 64, (0, 64), 9, "contiguous", 0),
    "documents": Problem(AttentionShape(1, 2, 1, 8, torch.bfloat16), 70, (0, 3, 40, 70), None, "zigzag", 0),
    "documents and window": Problem(AttentionShape(1, 2, 2, 8, torch.float32), 64, (0, 20, 64), 7, "striped", 0),
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", ["ring", "all_gather"])
def test_counted_bytes_are_scheduled_bytes(world_size, strategy):
    strategy = Strategy(strategy)
    for problem in PROBLEMS.values():
        passes = run_ranks(run_rank, world_size, problem, strategy, False)
        for rank, found in enumerate(passes):
            for way in ("forward", "backward"):
                wanted = traffic(strategy, problem.layout(world_size), problem.mask, problem.shape, way, rank)
                assert +found.sent[way] == +wanted
    assert world_size == 1 or any(found.sent["forward"] for found in passes)
