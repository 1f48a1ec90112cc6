"""RMSNorm as written in the paper (Zhang and Sennrich 2019): the oracle of the fast one."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in whatever precision it is given."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
