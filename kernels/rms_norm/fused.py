"""RMSNorm that keeps its input and one number per token, and makes one temporary tensor in backward.

torch composes it on CPU from elementwise operators, each with a result of its own that autograd keeps: three tensors of the
size of x, and twice the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension.

    Args:
        x: any shape [..., D], any float dtype; statistics and products are fp32 (fp64 for fp64).
        weight: [D], fp32 or wider.

    Returns:
        [..., D] in x's dtype.
    """
    if x.is_cuda:  # torch's own is one kernel there
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x_wide * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, inverse = ctx.saved_tensors
        wide, size = inverse.dtype, x.shape[-1]
        inverse = inverse.view(-1, 1)
        x, slope = x.reshape(-1, size).to(wide), dy.reshape(-1, size).to(wide)
        product = slope * x
        # What of dy lies along x changes only the length of x, which the norm undoes.
        along = product.mv(weight.to(wide)).unsqueeze(1).mul_(inverse.pow(3)).div_(size)
        dweight = product.t().mv(inverse[:, 0]).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dx = torch.mul(slope, weight, out=product).mul_(inverse).addcmul_(x, along, value=-1)
        return dx.view(dy.shape).to(dy.dtype), dweight, None
