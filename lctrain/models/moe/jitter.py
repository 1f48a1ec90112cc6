"""Noise for routers that depends on a token alone, so that every layout and every recomputation draws the same."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain.models.moe.tokens import Tokens

_GOLDEN, _MIX1, _MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""Constants of SplitMix64 (Steele et al. 2014) as signed numbers."""


def jitter_factors(tokens: Tokens, width: int, amount: float) -> Tensor:
    """Factors uniform in [1 - amount, 1 + amount], fp64 [n, width]: a hash of sample, position and feature.

    Every sample of a run has another number, so its noise is new in every step; all layers draw the same.
    """
    key = _mix(_mix(tokens.samples) + tokens.positions)
    feature = torch.arange(1, width + 1, device=key.device) * _GOLDEN
    bits = _logical_shift(_mix(key[:, None] + feature), 11)
    return 1 + amount * (2 * bits.double() / 2**53 - 1)


def _mix(z: Tensor) -> Tensor:
    z = z + _GOLDEN
    z = (z ^ _logical_shift(z, 30)) * _MIX1
    z = (z ^ _logical_shift(z, 27)) * _MIX2
    return z ^ _logical_shift(z, 31)


def _logical_shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & (2 ** (64 - by) - 1)
