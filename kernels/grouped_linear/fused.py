"""A linear map per group of rows, and the second half of a SwiGLU network per group: the arithmetic of experts.

Own backward passes: the operator's own raises for a zero-stride gradient, and keeps what need not be kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lctrain.kernels.grouped_linear.product import outer_products, rows_times


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of group e times weight[e]^T.

    Args:
        x: [M, K], rows in the order of their groups. weight: [E, N, K] in any float dtype, cast to that of x for the product.
        ends: int32 [E]; group e has the rows from ends[e-1] (0 for the first) to ends[e]; groups may be empty.

    Returns:
        [M, N] in x's dtype; rows from ends[-1] on are 0.
    """
    return _GroupedLinear.apply(x, weight, ends)


def grouped_swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """grouped_linear of silu(gate) * up, keeping only gate and up [M, K] for backward (see kernels.swiglu)."""
    return _GroupedSwigluLinear.apply(gate, up, weight, ends)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, ends)
        return rows_times(x, weight.to(x.dtype).transpose(1, 2), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        dy = dy.contiguous()
        dx = rows_times(dy, weight.to(dy.dtype), ends) if ctx.needs_input_grad[0] else None
        dweight = outer_products(dy, x, ends).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight, None


class _GroupedSwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight, ends)
        return rows_times(F.silu(gate).mul_(up), weight.to(gate.dtype).transpose(1, 2), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, ends = ctx.saved_tensors
        dy = dy.contiguous()
        gated = F.silu(gate)
        dweight = outer_products(dy, gated * up, ends).to(weight.dtype) if ctx.needs_input_grad[2] else None
        dhidden = rows_times(dy, weight.to(dy.dtype), ends)
        dup = gated.mul_(dhidden)
        dgate = torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=dhidden)
        return dgate, dup, dweight, None
