"""SwiGLU and the projection after it, keeping only gate and up for backward.

Composed from operators, autograd keeps silu(gate) and the product as well: four tensors [tokens, F], the largest of a layer.
Forming those two again costs two passes over memory, little beside the matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) W^T.

    Args:
        gate, up: [..., F] in one dtype. weight: [D, F] in any float dtype, cast to that of gate for the product.

    Returns:
        [..., D] in gate's dtype.
    """
    return _SwigluLinear.apply(gate, up, weight)


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up, weight = ctx.saved_tensors
        gated = F.silu(gate)
        hidden = gated * up
        dweight = (dy.flatten(0, -2).t() @ hidden.flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[2] else None
        dhidden = torch.matmul(dy, weight.to(dy.dtype), out=hidden)
        dup = gated.mul_(dhidden)
        dgate = torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=dhidden)
        return dgate, dup, dweight
