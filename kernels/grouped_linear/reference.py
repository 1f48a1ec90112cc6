"""Linear maps of groups of rows as a loop: the oracle of the grouped ones."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[e-1] to ends[e] of x [M, K] times weight[e] [N, K], transposed; [M, N], 0 for rows from ends[-1] on."""
    starts = [0, *ends.tolist()]
    parts = [x[start:end] @ w.t() for start, end, w in zip(starts, starts[1:], weight, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - starts[-1], weight.shape[1])])


def grouped_swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """grouped_linear of gate * sigmoid(gate) * up."""
    return grouped_linear(gate * torch.sigmoid(gate) * up, weight, ends)
