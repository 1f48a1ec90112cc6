"""Router: which experts a token goes to and with what weights. Logits and scores are fp32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.moe import RouterConfig
from lctrain.models.moe.jitter import jitter_factors
from lctrain.models.moe.tokens import Tokens
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Family, Place
from lctrain.models.tensor_parallel import shared

TINY = 1e-20
"""Added to a sum of weights that is divided by (DeepSeek-V3)."""


class Routing(NamedTuple):
    """The choices of n tokens among E experts.

    experts: int64 [n, k]. weights: [n, k], fp32 or wider, as `logits`.
    shares: [n, E], scores that add up to 1 for every token: what balancing losses push towards evenness.
    logits: [n, E].
    """

    experts: Tensor
    weights: Tensor
    shares: Tensor
    logits: Tensor


Settle = Callable[[Tokens, Tensor], Tensor]
"""Tokens, scores [n, E] -> scores to choose by; see lctrain.models.moe.rankings."""


class Router(nn.Module):
    """A linear gate and the choice of the top_k best experts; a gate for each task if there are several (M3ViT, 2022).

    settle: what decides between experts whose scores are equal but for rounding, in proofs; None: rounding.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, config: RouterConfig, parallel: ModelParallel) -> None:
        super().__init__()
        self.config, self.top_k, self.parallel = config, top_k, parallel
        shape = (n_experts, d_model) if config.tasks == 1 else (config.tasks, n_experts, d_model)
        self.weight = nn.Parameter(torch.empty(shape))
        self.settle: Settle | None = None

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {"weight": Place(Family.ROUTER)}

    def forward(
        self, x: Tensor, tasks: Tensor, bias: Tensor | None, tokens: Tokens | None = None, training: bool = False
    ) -> Routing:
        """Choices for x [n, d_model].

        Args:
            tasks: int64 [n]. bias: [E], added to scores for the choice, not for the weights. tokens: which they are; None in
            decoding. training: with jitter, if there is any.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if training and tokens is not None and self.config.jitter:
            x = x * jitter_factors(tokens, x.shape[1], self.config.jitter).to(x.dtype)
        settle = None if tokens is None or self.settle is None else partial(self.settle, tokens)
        return choose(self._logits(x, tasks), self.top_k, self.config, bias, settle)

    def _logits(self, x: Tensor, tasks: Tensor) -> Tensor:
        weight = shared(self.parallel, self.weight).to(x.dtype)
        if self.config.tasks == 1:
            return F.linear(x, weight)
        every = F.linear(x, weight.flatten(0, 1)).unflatten(1, (self.config.tasks, -1))
        own = F.one_hot(tasks, self.config.tasks).to(torch.bool)
        return torch.where(own[..., None], every, 0).sum(1)


def choose(
    logits: Tensor,
    top_k: int,
    config: RouterConfig,
    bias: Tensor | None = None,
    settle: Callable[[Tensor], Tensor] | None = None,
) -> Routing:
    """Scores, choice and weights from logits [n, E]; see RouterConfig.

    bias: [E], for the choice alone (DeepSeek-V3). settle: scores [n, E] -> those to choose by.
    """
    if config.score == "softmax":
        scores = shares = logits.softmax(dim=-1)
    else:
        scores = logits.sigmoid()
        shares = scores / (scores.sum(-1, keepdim=True) + TINY)
    with torch.no_grad():
        rank = scores if bias is None else scores + bias
        rank = rank if settle is None else settle(rank)
        if config.groups > 1:
            rank = rank.masked_fill(~_reachable(rank, top_k, config), float("-inf"))
        experts = rank.topk(top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    if config.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    return Routing(experts, weights * config.scale, shares, logits)


def _reachable(rank: Tensor, top_k: int, config: RouterConfig) -> Tensor:
    """Bool [n, E]: the experts of each token's best groups."""
    grouped = rank.unflatten(1, (config.groups, -1))
    best = {"top2_sum": 2, "top_k_over_groups": top_k // config.top_groups, "max": 1}[config.group_score]
    chosen = grouped.topk(best, dim=-1).values.sum(-1).topk(config.top_groups, dim=-1).indices
    mask = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=rank.device).scatter_(1, chosen, True)
    return mask[..., None].expand_as(grouped).flatten(1)
