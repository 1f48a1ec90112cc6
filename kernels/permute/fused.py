"""Tokens in the order of their experts, and back: gathers only, forward and backward, so that sums have one order.

A token that several experts share has several rows; `places` [T, k] says where each is, -1 for a choice that was dropped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Permutation(NamedTuple):
    """Rows sorted by expert, a token's rows in the order of the tokens.

    tokens: int64 [M], the token of each row. places: int64 [T, k], the row of each choice or -1. counts: int64 [E].
    slots: int64 [M], the flat choice (token * k + j) of each row.
    """

    tokens: Tensor
    places: Tensor
    counts: Tensor
    slots: Tensor


def permutation(experts: Tensor, n_experts: int, kept: Tensor | None = None) -> Permutation:
    """The stable sort of choices by expert.

    Args:
        experts: int64 [T, k], each token's experts. kept: bool [T, k], False for choices to leave out; None: all stay.
    """
    choices = experts.flatten()
    if kept is not None:
        choices = choices.masked_fill(~kept.flatten(), n_experts)  # sorts last
    ordered, slots = torch.sort(choices, stable=True)
    borders = torch.searchsorted(ordered, torch.arange(n_experts + 1, device=ordered.device))
    if kept is not None:
        slots = slots[: int(borders[-1])]
    places = torch.full_like(choices, -1)
    places[slots] = torch.arange(len(slots), device=slots.device)
    return Permutation(slots // experts.shape[1], places.view_as(experts), borders.diff(), slots)


def spread(x: Tensor, order: Permutation) -> Tensor:
    """The tokens' rows x [T, d] in the order of experts: [M, d]. Gradients of a token's rows are added in fp32 or wider."""
    return _Spread.apply(x, order.tokens, order.places)


def combine(y: Tensor, order: Permutation, weights: Tensor) -> Tensor:
    """Each token's rows times their weights, added up in the order of its choices.

    Args:
        y: [M, d]. weights: [T, k], fp32 or wider, in which the sum is formed.

    Returns:
        [T, d] in y's dtype; 0 for a token all of whose choices were dropped.
    """
    return _Combine.apply(y, order.places, order.slots, weights)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _add_up(dy, places, None).to(dy.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, places, slots, weights)
        return _add_up(y, places, weights).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, places, slots, weights = ctx.saved_tensors
        own = dout.index_select(0, slots // places.shape[1])  # the gradient of its token for every row
        dots = torch.linalg.vecdot(own.to(weights.dtype), y.to(weights.dtype))
        dweights = torch.zeros_like(weights).view(-1).index_copy_(0, slots, dots).view_as(weights)
        dy = (own * weights.flatten()[slots, None]).to(y.dtype)
        return dy, None, None, dweights


def _add_up(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over choices j of weights[:, j] * rows[places[:, j]] in fp32 or wider; choices with place -1 add nothing."""
    wide = torch.promote_types(rows.dtype, torch.float32) if weights is None else weights.dtype
    total = rows.new_zeros(len(places), rows.shape[1], dtype=wide)
    if not len(rows):
        return total
    for choice, place in enumerate(places.unbind(1)):
        term = rows.index_select(0, place.clamp(min=0))
        kept = (place >= 0).to(wide) if weights is None else weights[:, choice] * (place >= 0)
        total.addcmul_(term.to(wide), kept[:, None])
    return total
