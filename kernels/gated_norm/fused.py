"""Gated group RMSNorm of Mamba-2 (gate first, then norm), keeping only its inputs and one number per token and group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated_rms_norm(y: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """RMSNorm(y * silu(gate)) over each of `groups` equal parts of the last dimension, times weight.

    Args:
        y, gate: [..., D] in one float dtype; computed in fp32 (fp64 for fp64).
        weight: [D], fp32 or wider.

    Returns:
        [..., D] in y's dtype.
    """
    return _GatedRMSNorm.apply(y, gate, weight, eps, groups)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gate, weight, eps, groups):
        wide = torch.promote_types(y.dtype, torch.float32)
        product = F.silu(gate.to(wide)).mul_(y).unflatten(-1, (groups, -1))
        norm = torch.linalg.vector_norm(product, dim=-1, keepdim=True)
        inverse = norm.square_().div_(product.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(y, gate, weight, inverse)
        return product.mul_(inverse).flatten(-2).mul_(weight).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, gate, weight, inverse = ctx.saved_tensors
        wide, groups = inverse.dtype, inverse.shape[-2]
        gate_wide, slope = gate.to(wide), dout.to(wide)
        gated = F.silu(gate_wide)
        normed = (gated * y).unflatten(-1, (groups, -1)).mul_(inverse)
        dweight = None
        if ctx.needs_input_grad[2]:
            dweight = (normed.flatten(-2) * slope).flatten(0, -2).sum(0).to(weight.dtype)
        scaled = (slope * weight).unflatten(-1, (groups, -1))
        # What lies along the normed vector changes only its length, which the norm undoes.
        along = (scaled * normed).mean(-1, keepdim=True)
        dproduct = scaled.addcmul_(normed, along, value=-1).mul_(inverse).flatten(-2)
        dy = (dproduct * gated).to(y.dtype)
        dgate = torch.ops.aten.silu_backward(dproduct.mul_(y), gate_wide).to(gate.dtype)
        return dy, dgate, dweight, None, None
