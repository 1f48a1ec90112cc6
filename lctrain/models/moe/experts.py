"""Experts: feed-forward networks side by side, each on its own rows: in blocks on CPU, as grouped matrix products elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.moe import MoeConfig
from lctrain.kernels.grouped_linear.fused import grouped_linear, grouped_swiglu_linear
from lctrain.kernels.permute.fused import Permutation, combine, spread
from lctrain.kernels.routed_mlp import blocked
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Family, Place


class Experts(nn.Module):
    """This rank's experts: gate, up [experts, d_ff, d_model], down [experts, d_model, d_ff], fp32.

    Cut over ep by expert and over etp by hidden unit.
    """

    residual = ("down",)

    def __init__(self, d_model: int, config: MoeConfig, parallel: ModelParallel) -> None:
        super().__init__()
        self.activation = config.activation
        experts, d_ff = config.n_experts // parallel.ep.size, config.d_ff // parallel.etp.size
        self.gate = nn.Parameter(torch.empty(experts, d_ff, d_model)) if self.activation == "swiglu" else None
        self.up = nn.Parameter(torch.empty(experts, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(experts, d_model, d_ff))

    def places(self) -> dict[str, Place]:
        """See Place."""
        inwards, outwards = (Place(Family.EXPERT, {"ep": 0, "etp": axis}) for axis in (1, 2))
        return {"gate": inwards, "up": inwards, "down": outwards}

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [M, d_model] in the order of experts, expert e's ending at ends[e] (int32) -> [M, d_model].

        With etp, what this slice of the hidden units contributes to that.
        """
        if blocked.suits(rows):
            return blocked.routed_mlp(rows, ends, self.gate, self.up, self.down, self.activation)
        up = grouped_linear(rows, self.up, ends)
        if self.gate is not None:
            return grouped_swiglu_linear(grouped_linear(rows, self.gate, ends), up, self.down, ends)
        hidden = F.gelu(up, approximate="tanh") if self.activation == "gelu" else F.relu(up).square()
        return grouped_linear(hidden, self.down, ends)

    def mix(self, x: Tensor, order: Permutation, ends: Tensor, weights: Tensor) -> Tensor:
        """Tokens x [n, d_model] -> the weighted sums of their experts' outputs, where this rank holds all experts.

        weights: [n, k], of the choices that `order` sorted.
        """
        if blocked.suits(x):
            row_weights = weights.flatten().index_select(0, order.slots)
            return blocked.routed_mlp(x, ends, self.gate, self.up, self.down, self.activation, order.tokens, row_weights)
        return combine(self(spread(x, order), ends), order, weights)
