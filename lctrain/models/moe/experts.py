"""Experts: feed-forward networks side by side, each on its own rows, as grouped matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.moe import MoeConfig
from lctrain.kernels.grouped_linear.fused import grouped_linear, grouped_swiglu_linear
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
        up = grouped_linear(rows, self.up, ends)
        if self.gate is not None:
            return grouped_swiglu_linear(grouped_linear(rows, self.gate, ends), up, self.down, ends)
        hidden = F.gelu(up, approximate="tanh") if self.activation == "gelu" else F.relu(up).square()
        return grouped_linear(hidden, self.down, ends)
