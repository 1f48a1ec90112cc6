"""The second half of a SwiGLU network as a formula (Shazeer 2020): the oracle of the frugal one."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(gate * sigmoid(gate) * up) W^T for gate, up [..., F] and weight [D, F]."""
    return (gate * torch.sigmoid(gate) * up) @ weight.t()
