"""AdamW's parameter groups, the learning rate as a function of the step, and the one true gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lctrain.config.optim import OptimConfig
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import parameter_places


def make_adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over two groups: what decays (see Place.decays), and what does not. The loop sets `lr` before every step."""
    return _adamw([[model.get_parameter(name) for name in group] for group in _decaying_and_not(model)], config)


def checkpoint_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """make_adamw's groups as checkpoints hold them, with names for parameters, for an engine whose AdamW is another."""
    groups = _adamw([[nn.Parameter(torch.empty(1))], [nn.Parameter(torch.empty(1))]], config).param_groups
    return [{**group, "params": names} for group, names in zip(groups, _decaying_and_not(model), strict=True)]


def _decaying_and_not(model: nn.Module) -> tuple[list[str], list[str]]:
    places = parameter_places(model)
    split: tuple[list[str], list[str]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            split[not places[name].decays(parameter)].append(name)
    return split


def _adamw(parameters: list[list[nn.Parameter]], config: OptimConfig) -> torch.optim.AdamW:
    decay = (config.weight_decay, 0.0)
    groups = [{"params": group, "weight_decay": rate} for group, rate in zip(parameters, decay, strict=True)]
    # A tensor step count and fused kernels: one pass over memory on CPU and CUDA alike.
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) in a run of `steps`; the last step gets lr * min_ratio."""
    schedule = config.schedule
    warmup = schedule.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if schedule.kind == "constant":
        return config.lr
    begin = warmup
    if schedule.kind == "wsd":
        begin = max(warmup, steps - math.ceil(schedule.decay_fraction * steps))
    done = min(1.0, max(0.0, (step - begin + 1) / max(1, steps - begin)))
    if schedule.kind == "wsd" and step < begin:
        done = 0.0
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
    return config.lr * (schedule.min_ratio + (1 - schedule.min_ratio) * shape)


@torch.no_grad()
def global_grad_norm(model: nn.Module, parallel: ModelParallel) -> Tensor:
    """L2 norm over all gradients, fp64 scalar, every parameter counted once, equal on all ranks. Collective.

    Sharded gradients (DTensor) lie spread over all ranks; cut ones add up over the groups that they are cut over; all others
    are complete on every rank after reduction and are counted as they are.
    """
    spread: dict[tuple[str, ...], list[Tensor]] = {}
    places = parameter_places(model)
    for name, parameter in model.named_parameters():
        over = ("all ranks",) if isinstance(parameter, DTensor) else tuple(sorted(places[name].cuts))
        gradients = spread.setdefault(over, [])
        if parameter.grad is not None:
            gradients.append(parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad)
    device = next((p.device for p in model.parameters()), None)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for over, gradients in spread.items():
        part = sum_of_squares(gradients).to(total.device)
        if over == ("all ranks",):
            dist.all_reduce(part)
        else:
            for dimension in over:
                parallel.group(dimension).all_reduce("grad_norm", part)
        total += part
    return total.sqrt()


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Over all elements, fp64 scalar."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply all gradients in place."""
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, factor)


def sum_of_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what this process holds of some tensors."""
    return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)
