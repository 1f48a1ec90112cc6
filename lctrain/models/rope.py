"""Rotary position embedding (Su et al. 2021) with the usual ways to stretch it to longer context.

Halves are rotated against each other (dimension i with i + D/2), the convention of Llama in transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lctrain.config.rope import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, fp64 [head_dim / 2], and the factor on cos and sin (yarn's temperature).

    linear: Chen et al. 2023 (position interpolation); yarn: Peng et al. 2023; llama3: the rule published with Llama 3.1.
    Pairs beyond `config.fraction` do not turn.
    """
    if config.fraction < 1:
        rotated = int(head_dim * config.fraction) // 2 * 2
        inverse, temperature = inverse_frequencies(config.model_copy(update={"fraction": 1.0}), rotated)
        return torch.cat([inverse, inverse.new_zeros((head_dim - rotated) // 2)]), temperature
    half = torch.arange(0, head_dim, 2, dtype=torch.float64)
    inverse = config.theta ** (-half / head_dim)
    if config.scaling == "none":
        return inverse, 1.0
    if config.scaling == "linear":
        return inverse / config.factor, 1.0
    if config.scaling == "llama3":
        wavelength = 2 * math.pi / inverse
        context = config.original_max_position
        keep = (context / wavelength - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        keep = keep.clamp(0, 1)
        return (1 - keep) * inverse / config.factor + keep * inverse, 1.0

    def pair_at(rotations: float) -> float:
        """Index of the pair that turns `rotations` times over the original context."""
        return head_dim * math.log(config.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low = max(math.floor(pair_at(config.beta_fast)), 0)
    high = min(math.ceil(pair_at(config.beta_slow)), head_dim - 1)
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    temperature = yarn_temperature(config, config.mscale) / yarn_temperature(config, config.mscale_all_dim)
    return stretch * inverse / config.factor + (1 - stretch) * inverse, temperature


def yarn_temperature(config: RopeConfig, mscale: float) -> float:
    """t(mscale) of RopeConfig; 1 without yarn."""
    return 0.1 * mscale * math.log(config.factor) + 1.0 if config.scaling == "yarn" and config.factor > 1 else 1.0


def rotation(config: RopeConfig, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin for int64 positions [B, T]: fp32 [B, T, 1, head_dim / 2].

    Angles are formed in fp64: in fp32 a position of a million would already be off by 0.06 radians.
    """
    inverse, temperature = inverse_frequencies(config, head_dim)
    angles = positions.double().unsqueeze(-1) * inverse.to(positions.device)
    return (angles.cos() * temperature).float().unsqueeze(2), (angles.sin() * temperature).float().unsqueeze(2)
