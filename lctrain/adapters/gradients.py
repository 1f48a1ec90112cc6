"""Gradients of a model that every rank of a sequence group holds whole."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lctrain.parallel.group import RankGroup


def all_reduce_gradients(model: nn.Module, group: RankGroup) -> None:
    """Add up the gradients of all ranks of `group`, in place; call it between backward and the optimizer's step.

    A sum, not a mean: each rank's loss is its part of the mean over all targets of the whole sequence. A parameter that has a
    gradient on some ranks only (an expert that saw no token here) gets one everywhere.

    Raises:
        ValueError: a parameter is sharded (FSDP), so that its gradients are reduced elsewhere.
    """
    if group.size == 1:
        return
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in named:
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is a sharded DTensor: its gradients are reduced by whoever sharded it, not here")
    if not named:
        return
    parameters = [parameter for _, parameter in named]
    used = torch.tensor(
        [parameter.grad is not None for parameter in parameters], dtype=torch.int32, device=parameters[0].device
    )
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group.process_group)
    pending = []
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if anywhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            pending.append(dist.all_reduce(parameter.grad, group=group.process_group, async_op=True))
    for work in pending:
        work.wait()
