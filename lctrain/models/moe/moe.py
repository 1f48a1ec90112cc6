"""Mixture of experts: the mixer `E` = router x balancer x dispatch x experts, and a part that every token uses."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.model import MlpConfig, ModelConfig
from lctrain.kernels.permute.fused import combine, permutation, spread
from lctrain.models.layers import Linear
from lctrain.models.mlp import Mlp
from lctrain.models.moe.capacity import within_capacity
from lctrain.models.moe.experts import Experts
from lctrain.models.moe.router import Router, Routing
from lctrain.models.moe.stats import Balancer
from lctrain.models.moe.tokens import local_tokens
from lctrain.models.parallel import ModelParallel
from lctrain.models.tensor_parallel import shared
from lctrain.parallel.dispatch import Dispatch
from lctrain.parallel.mask import Borders
from lctrain.parallel.sequence import SequenceMeta


@dataclasses.dataclass
class TaskState:
    """What `decode` needs: which gate a task-conditioned router uses."""

    task: int = 0


class MixtureOfExperts(nn.Module):
    """Each token's output is the weighted sum of its top_k experts' outputs, plus that of the shared part.

    Weights are fp32 and the sum over experts is formed in fp32. Padding is not routed.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallel) -> None:
        super().__init__()
        settings = self.settings = config.moe
        self.parallel = parallel
        self.router = Router(config.d_model, settings.n_experts, settings.top_k, settings.router, parallel)
        self.balancer = Balancer("moe", settings.n_experts, settings.balance, parallel)
        self.experts = Experts(config.d_model, settings, parallel)
        self.shared: Mlp | None = None
        self.shared_gate: Linear | None = None
        if settings.shared_d_ff:
            mlp = MlpConfig(d_ff=settings.shared_d_ff, activation=settings.activation)
            self.shared = Mlp(config.model_copy(update={"mlp": mlp}), parallel)
            self.shared_gate = Linear(config.d_model, 1) if settings.shared_gate else None

    def forward(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, S, d_model] -> same shape. Collective over the ranks that share experts or the sequence.

        S tokens of this rank's share of the sequence, which tensor-parallel ranks divide among them.
        """
        tokens = local_tokens(seq, x.shape[1], self.parallel.tp.rank, x.device)
        flat = x.flatten(0, 1)
        own = flat if tokens.real is None else flat.index_select(0, tokens.real)
        training = self.training and torch.is_grad_enabled()
        routing = self.router(own, tokens.tasks, self.balancer.bias, tokens, training)
        kept = None
        if (factor := self.settings.capacity_factor) is not None:
            kept = within_capacity(routing.experts, tokens, seq, self.parallel.tp, factor, self.settings.n_experts)
        y = self._mix(own, routing, kept)
        if training:
            y = self.balancer(y, routing, tokens, seq, kept)
        if tokens.real is not None:
            y = torch.zeros_like(flat).index_copy(0, tokens.real, y)
        y = y.view_as(x)
        return y if self.shared is None else y + self._gated(x, self.shared(x, seq))

    def new_state(self) -> TaskState:
        """State for `decode`."""
        return TaskState()

    def decode(self, x: Tensor, state: TaskState) -> Tensor:
        """The newest tokens x [B, S, d_model]; no choice is dropped, as the documents' lengths are not known yet."""
        flat = x.flatten(0, 1)
        tasks = torch.full((len(flat),), state.task, device=x.device)
        y = self._mix(flat, self.router(flat, tasks, self.balancer.bias), None).view_as(x)
        return y if self.shared is None else y + self._gated(x, self.shared.decode(x, None))

    def flops(self, documents: tuple[Borders, ...]) -> int:
        """Multiply-adds x 2 of one forward pass over whole sequences with these documents: what tokens use, nothing dropped."""
        tokens = sum(borders[-1] for borders in documents)
        one_expert = sum(p.numel() // p.shape[0] for p in self.experts.parameters()) * self.parallel.etp.size
        gate = 0 if self.shared_gate is None else self.shared_gate.weight.numel()
        shared = 0 if self.shared is None else self.shared.flops(documents)
        return 2 * tokens * (self.router.weight.numel() + self.settings.top_k * one_expert + gate) + shared

    def _mix(self, x: Tensor, routing: Routing, kept: Tensor | None) -> Tensor:
        """[n, d_model] -> same shape."""
        order = permutation(routing.experts, self.settings.n_experts, kept)
        dispatch = Dispatch.plan(order.counts, self.parallel.ep, self.parallel.etp)
        if dispatch.order is None:
            return self.experts.mix(x, order, dispatch.ends, routing.weights)
        rows = dispatch.from_experts(self.experts(dispatch.to_experts(spread(x, order)), dispatch.ends))
        return combine(rows, order, routing.weights)

    def _gated(self, x: Tensor, y: Tensor) -> Tensor:
        """The shared part's output y [B, S, d_model], times its gate if there is one."""
        if self.shared_gate is None:
            return y
        weight = shared(self.parallel, self.shared_gate.weight).to(x.dtype)
        return y * F.linear(x, weight).sigmoid()
