"""What both examples share: start two gloo processes, or use torchrun's, and compare two lists of losses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from lctrain.launch.ranks import run_ranks

RANKS = 2
TOLERANCE = 1e-5


def compare(sharded: Callable[[int, int], list[float]], unsharded: Callable[[int, int], list[float]]) -> int:
    """Run both functions of (rank, world_size), print their losses side by side; exit status 1 if any differ.

    The first runs on two processes, or on torchrun's if that started us; the second on one.
    """
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        ours = sharded(rank, ranks)
        dist.barrier()
        dist.destroy_process_group()
        if rank:
            return 0
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        expected = unsharded(0, 1)
        dist.destroy_process_group()
    else:
        ranks = RANKS
        ours = run_ranks(sharded, ranks)[0]
        expected = run_ranks(unsharded, 1)[0]
    print(f"step   over {ranks} ranks   on one process   difference")
    worst = 0.0
    for step, (found, loss) in enumerate(zip(ours, expected, strict=True), start=1):
        worst = max(worst, abs(found - loss))
        print(f"{step:4}   {found:12.7f}   {loss:14.7f}   {abs(found - loss):10.1e}")
    if worst <= TOLERANCE:
        print(f"same losses: they differ by {worst:.1e} at most")
        return 0
    print(f"different losses: {worst:.1e} is more than {TOLERANCE:g}", file=sys.stderr)
    return 1
