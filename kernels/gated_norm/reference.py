"""Group RMSNorm with a gate, as formulas: the oracles of the frugal forms."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """RMSNorm(y * silu(gate)) over each of `groups` equal parts of the last dimension, times weight [D]."""
    return _normed(y * gate * torch.sigmoid(gate), eps, groups) * weight


def rms_norm_then_gate(y: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """sigmoid(gate) * RMSNorm(y) over each of `groups` equal parts of the last dimension, times weight [D]."""
    return torch.sigmoid(gate) * _normed(y, eps, groups) * weight


def _normed(x: Tensor, eps: float, groups: int) -> Tensor:
    parts = x.unflatten(-1, (groups, -1))
    return (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
