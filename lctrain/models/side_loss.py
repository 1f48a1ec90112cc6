"""A loss that a layer adds by itself, such as a router's balance: its gradient joins the backward pass where the layer stands.

A sum of losses at the end of the model would not survive pipeline stages, nor the recomputation of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


def inject(x: Tensor, loss: Tensor) -> Tensor:
    """x itself; backward through it also differentiates `loss` (a scalar) with weight 1."""
    return _Inject.apply(x, loss)
