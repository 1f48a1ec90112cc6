"""Rotary embedding that writes its result once and keeps nothing but the angles.

Its gradient is the rotation back, so neither direction needs the input.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x.

    Args:
        x: [B, T, H, D], any float dtype; computed in fp32 (fp64 for fp64).
        cos, sin: [B, T, 1, D/2]; no gradient.

    Returns:
        [B, T, H, D] in x's dtype.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    left, right = x.to(wide).chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=wide, device=x.device)
    new_left, new_right = turned.chunk(2, dim=-1)
    torch.mul(left, cos, out=new_left).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=new_right).addcmul_(left, sin, value=sign)
    return turned.to(x.dtype)
