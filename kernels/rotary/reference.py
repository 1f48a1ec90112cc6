"""Rotary embedding written as a complex product (Su et al. 2021): the oracle of the fast one."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [..., D] by angles with cos and sin [..., D/2]."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.complex(left, right) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], dim=-1)
