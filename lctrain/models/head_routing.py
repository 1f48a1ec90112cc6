"""Mixture-of-heads attention (MoH, Jin et al. 2024, arXiv 2410.11842): each token weighs the query heads and uses only some.

It is a model, not a saving: all heads attend over everything, and what they give is weighted afterwards, as in the authors'
code. To skip a head for some queries, kernels and sequence-parallel schedules would need ragged heads.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.moe import BalanceConfig, RoutedHeadsConfig, RouterConfig
from lctrain.models.moe.router import Routing, Settle, choose
from lctrain.models.moe.stats import Balancer
from lctrain.models.moe.tokens import Tokens, local_tokens
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Family, Place
from lctrain.models.tensor_parallel import shared
from lctrain.parallel.sequence import SequenceMeta


class HeadRouter(nn.Module):
    """A weight for every query head and token, in two stages, as the authors' code has it.

    The h_s shared heads get h_s * softmax(W_s x); of the others the top_k best get top_k * softmax(W_r x), renormalised over
    them, and the rest 0; then 2 * softmax(W_h x) weighs the two kinds. Scores are fp32. settle: see Router.
    """

    def __init__(self, d_model: int, n_heads: int, config: RoutedHeadsConfig, parallel: ModelParallel) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel
        routed = n_heads - config.shared
        self.routed = nn.Parameter(torch.empty(routed, d_model))
        self.shared = nn.Parameter(torch.empty(config.shared, d_model)) if config.shared > 1 else None
        self.kinds = nn.Parameter(torch.empty(2, d_model)) if config.shared else None
        self.settle: Settle | None = None
        self.balancer = Balancer("moh", routed, BalanceConfig(switch=config.balance), parallel)

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {name: Place(Family.ROUTER) for name in ("routed", "shared", "kinds")}

    def forward(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, S, d_model], this rank's tokens -> weights [B, S, n_heads], fp32 or wider; 0 on padding. Collective."""
        tokens = local_tokens(seq, x.shape[1], self.parallel.tp.rank, x.device)
        flat = x.flatten(0, 1)
        own = flat if tokens.real is None else flat.index_select(0, tokens.real)
        routing, weights = self._routed(own, tokens)
        if self.training and torch.is_grad_enabled():
            weights = self.balancer(weights, routing, tokens, seq)
        weights = self._with_shared(own, weights)
        if tokens.real is not None:
            weights = weights.new_zeros(len(flat), weights.shape[1]).index_copy(0, tokens.real, weights)
        return weights.unflatten(0, x.shape[:2])

    def decode(self, x: Tensor) -> Tensor:
        """As forward, for the newest tokens x [B, S, d_model]."""
        flat = x.flatten(0, 1)
        return self._with_shared(flat, self._routed(flat)[1]).unflatten(0, x.shape[:2])

    def _routed(self, x: Tensor, tokens: Tokens | None = None) -> tuple[Routing, Tensor]:
        """The choice among the routed heads, and their weights [n, routed]."""
        top_k = self.config.top_k
        settle = None if tokens is None or self.settle is None else partial(self.settle, tokens)
        routing = choose(self._scores(x, self.routed), top_k, RouterConfig(scale=top_k), settle=settle)
        return routing, torch.zeros_like(routing.shares).scatter(1, routing.experts, routing.weights)

    def _with_shared(self, x: Tensor, weights: Tensor) -> Tensor:
        """The weights of all heads, shared ones first, [n, n_heads]."""
        if self.kinds is None:
            return weights
        kinds = 2 * self._scores(x, self.kinds).softmax(-1)
        always = kinds[:, :1]
        if self.shared is not None:  # a single one has nothing to share with
            always = always * self.config.shared * self._scores(x, self.shared).softmax(-1)
        return torch.cat([always, kinds[:, 1:] * weights], dim=-1)

    def _scores(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), shared(self.parallel, weight).to(wide))
