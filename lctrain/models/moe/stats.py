"""Balancer: the losses, the statistics and the selection bias of one mixture, and what an engine does with those of a model.

Statistics are collected in backward, which runs once for every forward pass that trains: neither recomputed activations nor
evaluation count. They add up over an optimizer step, then over ranks, and then move the bias.

An engine calls, once per optimizer step: gather_statistics after the last backward; update_biases with the weights' update;
forget_statistics when the step is over or discarded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lctrain.config.moe import BalanceConfig
from lctrain.models.moe.balance import balance_loss, count
from lctrain.models.moe.router import Routing
from lctrain.models.moe.tokens import Tokens
from lctrain.models.parallel import ModelParallel
from lctrain.models.side_loss import inject
from lctrain.parallel.sequence import SequenceMeta

_SCALARS = 5
"""Sums beside the experts' counts: tokens, entropies, dropped choices, balancing losses, micro-batches."""

DIGITS = 4
"""Significant digits of recorded metrics."""


class Balancer(nn.Module):
    """Watches one router's choices.

    bias: fp32 [n_experts], added to scores for the choice; a buffer that checkpoints keep; None without bias_rate.
    """

    def __init__(self, kind: str, n_experts: int, config: BalanceConfig, parallel: ModelParallel) -> None:
        super().__init__()
        self.kind, self.n_experts, self.config, self.parallel = kind, n_experts, config, parallel
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(n_experts) if config.bias_rate else None)
        self.sums: Tensor | None = None

    def forward(self, x: Tensor, routing: Routing, tokens: Tokens, seq: SequenceMeta, kept: Tensor | None = None) -> Tensor:
        """x itself, of any shape that needs a gradient; backward through it adds losses and collects statistics. Collective.

        kept: bool [n, k], False for choices that were dropped.
        """
        loss = balance_loss(self.config, routing, tokens, (seq.group, self.parallel.tp), self.parallel.dp_cp)
        if loss is not None:
            x = inject(x, loss * seq.side_loss_scale)
        sharing = seq.group.size * self.parallel.tp.size
        return _Collect.apply(x, self._sums(routing, kept, loss, sharing), self)

    def add(self, sums: Tensor) -> None:
        """One forward pass's sums, fp64 [n_experts + 5]."""
        self.sums = sums if self.sums is None else self.sums + sums

    @torch.no_grad()
    def _sums(self, routing: Routing, kept: Tensor | None, loss: Tensor | None, sharing: int) -> Tensor:
        shares = routing.shares
        entropy = -torch.special.xlogy(shares, shares).sum()
        dropped = 0 if kept is None else kept.numel() - kept.sum()
        scalars = (len(shares), entropy, dropped, 0 if loss is None else loss, 1 / sharing)
        return torch.cat(
            [
                count(routing.experts.flatten(), self.n_experts).double(),
                torch.stack([torch.as_tensor(value, dtype=torch.float64, device=shares.device) for value in scalars]),
            ]
        )


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sums: Tensor, balancer: Balancer) -> Tensor:
        ctx.sums, ctx.balancer = sums, balancer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.balancer.add(ctx.sums)
        return grad, None, None


def balancers(model: nn.Module) -> list[Balancer]:
    """Those of all mixtures, in the order of layers."""
    return [module for module in model.modules() if isinstance(module, Balancer)]


@torch.no_grad()
def gather_statistics(model: nn.Module, parallel: ModelParallel) -> dict[str, Any]:
    """Metrics of the step since statistics were last forgotten, one entry per mixture in each list. Collective.

    For E layers: moe_load (every expert's share of the choices, 1 / n_experts if even), moe_max_violation (largest load over
    mean - 1), moe_entropy (of the router's scores, nats per token), moe_dropped (share of the choices), moe_balance_loss
    (weighted, mean over micro-batches), moe_bias (largest selection bias by magnitude, if there are biases). The same with
    `moh_` for routed heads.
    """
    watched = balancers(model)
    if not watched:
        return {}
    device = next(model.parameters()).device
    empty = [torch.zeros(b.n_experts + _SCALARS, dtype=torch.float64, device=device) for b in watched]
    everything = torch.cat([zero if b.sums is None else b.sums for b, zero in zip(watched, empty, strict=True)])
    for group in (parallel.dp_cp, parallel.tp):
        group.all_reduce("expert_counts", everything)
    extra: dict[str, list[Any]] = {}
    for balancer, sums in zip(watched, everything.split([len(zero) for zero in empty]), strict=True):
        balancer.sums = sums
        for name, value in _metrics(balancer, sums.cpu()).items():
            extra.setdefault(f"{balancer.kind}_{name}", []).append(value)
    return extra


@torch.no_grad()
def update_biases(model: nn.Module) -> None:
    """Move every bias by bias_rate towards even use: up for experts below the mean count, down for those above.

    To be called between gather_statistics and forget_statistics, on every rank alike.
    """
    for balancer in balancers(model):
        if balancer.bias is not None and balancer.sums is not None:
            counts = balancer.sums[: balancer.n_experts]
            balancer.bias += balancer.config.bias_rate * (counts.mean() - counts).sign().to(balancer.bias)


def forget_statistics(model: nn.Module) -> None:
    """Begin a new step."""
    for balancer in balancers(model):
        balancer.sums = None


def _metrics(balancer: Balancer, sums: Tensor) -> dict[str, Any]:
    counts, (tokens, entropy, dropped, loss, passes) = sums[: balancer.n_experts], sums[balancer.n_experts :].tolist()
    choices = max(1.0, float(counts.sum()))
    found: dict[str, Any] = {
        "load": [_short(value) for value in (counts / choices).tolist()],
        "max_violation": _short(float(counts.max()) * balancer.n_experts / choices - 1),
        "entropy": _short(entropy / max(1.0, tokens)),
        "dropped": _short(dropped / choices),
        "balance_loss": _short(loss / max(1.0, passes)),
    }
    if balancer.bias is not None:
        found["bias"] = _short(float(balancer.bias.abs().max()))
    return found


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
