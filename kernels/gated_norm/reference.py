"""Mamba-2's gated norm as a formula: the oracle of the frugal form."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """RMSNorm(y * silu(gate)) over each of `groups` equal parts of the last dimension, times weight [D]."""
    product = (y * gate * torch.sigmoid(gate)).unflatten(-1, (groups, -1))
    normed = product / (product.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed.flatten(-2) * weight
