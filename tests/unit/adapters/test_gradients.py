"""Adding up gradients over the ranks of a sequence group."""

from __future__ import annotations

import torch
from torch import nn

from lctrain.adapters.gradients import all_reduce_gradients
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.group import RankGroup


def reduced(rank: int, world_size: int) -> list[torch.Tensor | None]:
    """Gradients of: a shared weight, one that only rank 1 uses, one that nobody uses, a frozen one."""
    model = nn.ParameterList(torch.ones(3) for _ in range(4))
    model[3].requires_grad_(False)
    loss = (rank + 1) * model[0].sum() + model[3].sum()
    if rank == 1:
        loss = loss + 5 * model[1].sum()
    loss.backward()
    all_reduce_gradients(model, RankGroup(torch.distributed.group.WORLD))
    return [parameter.grad for parameter in model]


def test_sum_over_ranks_also_of_weights_that_some_do_not_use():
    for shared, lone, unused, frozen in run_ranks(reduced, 2):
        assert shared.tolist() == [3.0] * 3
        assert lone.tolist() == [5.0] * 3
        assert unused is None
        assert frozen is None


def test_one_rank_has_nothing_to_add():
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    all_reduce_gradients(model, RankGroup())
    assert model.bias.grad.tolist() == [1.0]
