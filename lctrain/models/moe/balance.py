"""Balancing losses: what makes a router use all experts evenly. Formulas and reductions are in docs/moe.md.

Every function returns this rank's part of a mean over the real tokens of the micro-batch: the parts of all ranks that share
the sequences add up to the loss, and their gradients to its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lctrain.config.moe import BalanceConfig
from lctrain.models.moe.router import Routing
from lctrain.models.moe.tokens import Tokens
from lctrain.parallel.group import RankGroup


def balance_loss(
    config: BalanceConfig, routing: Routing, tokens: Tokens, sequence: Sequence[RankGroup], dp_cp: RankGroup
) -> Tensor | None:
    """The weighted sum of all configured losses, a scalar; None if there are none. Collective.

    Args:
        sequence: groups over which a sequence's tokens are spread (cp and tp). dp_cp: all ranks with tokens of their own.
    """
    parts = []
    experts, n = routing.experts, routing.shares.shape[1]
    if config.switch:
        counts = _sum(count(experts.flatten(), n), sequence)
        parts.append(config.switch * even_use(counts, routing.shares, tokens.total))
    if config.sequence:
        keys = (tokens.documents[:, None] * n + experts).flatten()
        counts = _sum(count(keys, n * len(tokens.lengths)), sequence).view(-1, n)
        parts.append(config.sequence * even_use_in_documents(counts, routing.shares, tokens))
    if config.global_batch:
        counts = _sum(count(experts.flatten(), n), (dp_cp, *sequence[1:]))
        data_parallel = dp_cp.size // sequence[0].size
        everyone = counts.sum().to(routing.shares.dtype) / experts.shape[1]
        parts.append(config.global_batch * even_use(counts, routing.shares, everyone / data_parallel))
    if config.z_loss:
        parts.append(config.z_loss * routing.logits.logsumexp(-1).square().sum() / max(1, tokens.total))
    return torch.stack(parts).sum() if parts else None


def even_use(counts: Tensor, shares: Tensor, total: Tensor | int) -> Tensor:
    """E * sum_i f_i P_i: f an expert's part of all choices, P its share [n, E] averaged over `total` tokens; 1 if even."""
    used = counts.to(shares.dtype) / counts.sum().clamp(min=1)
    return shares.shape[1] * (shares * used).sum() / torch.as_tensor(total, dtype=shares.dtype).clamp(min=1)


def even_use_in_documents(counts: Tensor, shares: Tensor, tokens: Tokens) -> Tensor:
    """The mean over documents, weighted with their tokens, of even_use within each; counts: int64 [documents, E]."""
    used = counts.to(shares.dtype) / counts.sum(-1, keepdim=True).clamp(min=1)
    return shares.shape[1] * (shares * used[tokens.documents]).sum() / max(1, tokens.total)


def count(keys: Tensor, n: int) -> Tensor:
    """How often each of 0 .. n-1 occurs among int64 keys: int64 [n]."""
    ordered = keys.sort().values
    return torch.searchsorted(ordered, torch.arange(n + 1, device=keys.device)).diff()


def _sum(counts: Tensor, groups: Sequence[RankGroup]) -> Tensor:
    for group in groups:
        group.all_reduce("expert_counts", counts)
    return counts
