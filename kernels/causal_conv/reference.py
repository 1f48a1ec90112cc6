"""Causal depthwise convolution with SiLU, tap by tap: the oracle of the fast form."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, positions: Tensor | None = None, halo: Tensor | None = None
) -> Tensor:
    """silu(bias + sum_s weight[:, K-1-s] x_{t-s}), in whatever precision it is given; see causal_conv.fused for the rest."""
    taps, tokens = weight.shape[1], x.shape[1]
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if halo is None else halo
    padded = torch.cat([before, x], dim=1)
    y = torch.zeros_like(x) if bias is None else bias.expand_as(x)
    for back in range(taps):
        earlier = padded[:, taps - 1 - back : taps - 1 - back + tokens]
        if positions is not None:
            earlier = torch.where((positions >= back)[..., None], earlier, torch.zeros_like(earlier))
        y = y + weight[:, taps - 1 - back] * earlier
    return y * torch.sigmoid(y)
