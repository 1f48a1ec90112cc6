"""Group RMSNorm with a gate before it (Mamba-2) or after it (linear attention).

Both keep only their inputs and one number per token and group; composed from operators, autograd would keep four tensors.
"""

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


def rms_norm_then_gate(y: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """sigmoid(gate) * RMSNorm(y) over each of `groups` equal parts of the last dimension, times weight; as gated_rms_norm."""
    return _RMSNormThenGate.apply(y, gate, weight, eps, groups)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gate, weight, eps, groups):
        wide = torch.promote_types(y.dtype, torch.float32)
        product = F.silu(gate.to(wide)).mul_(y).unflatten(-1, (groups, -1))
        inverse = _inverse_rms(product, eps)
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
        dweight = (normed.flatten(-2) * slope).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        dproduct = _through_norm((slope * weight).unflatten(-1, (groups, -1)), normed, inverse).flatten(-2)
        dy = (dproduct * gated).to(y.dtype)
        dgate = torch.ops.aten.silu_backward(dproduct.mul_(y), gate_wide).to(gate.dtype)
        return dy, dgate, dweight, None, None


class _RMSNormThenGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gate, weight, eps, groups):
        wide = torch.promote_types(y.dtype, torch.float32)
        parts = y.to(wide).unflatten(-1, (groups, -1))
        inverse = _inverse_rms(parts, eps)
        ctx.save_for_backward(y, gate, weight, inverse)
        return (parts * inverse).flatten(-2).mul_(weight).mul_(torch.sigmoid(gate.to(wide))).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        y, gate, weight, inverse = ctx.saved_tensors
        wide, groups = inverse.dtype, inverse.shape[-2]
        opening = torch.sigmoid(gate.to(wide))
        normed = y.to(wide).unflatten(-1, (groups, -1)) * inverse
        slope = dout * opening
        dweight = (normed.flatten(-2) * slope).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        dgate = (slope * weight).mul_(normed.flatten(-2)).mul_(1 - opening).to(gate.dtype)
        dy = _through_norm(slope.mul_(weight).unflatten(-1, (groups, -1)), normed, inverse).flatten(-2).to(y.dtype)
        return dy, dgate, dweight, None, None


def _inverse_rms(parts: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(parts, dim=-1, keepdim=True)
    return norm.square_().div_(parts.shape[-1]).add_(eps).rsqrt_()


def _through_norm(slope: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of what was normed, in the place of `slope`; along itself it changes only its length, which the norm undoes."""
    along = (slope * normed).mean(-1, keepdim=True)
    return slope.addcmul_(normed, along, value=-1).mul_(inverse)
