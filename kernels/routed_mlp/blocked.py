"""Feed-forward networks on the rows that were routed to them, block by block of rows: the form for CPUs.

Gather, three products, activation, weighting and sum of a block all happen in cache. What a pass over whole tensors costs on a
CPU is not its arithmetic but its fresh memory: reading, writing and mapping 33 MB takes 15 ms, silu of them in cache 2. Only
gate and up [M, F] are kept for backward, and neither gathered rows nor results exist as a whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

BLOCK = 512
"""Most rows of a block. With 512 columns, 256 to 1,024 were measured as equally fast to 5 %; shorter ones add to a weight's
gradient more often."""

FEW_ROWS = 4
"""Fewer are padded with zeros; see kernels.grouped_linear.product."""

VECTOR = 64
"""Numbers that a vectorised loop takes at once, at most (bf16, AVX-512). What is left at a tensor's end is computed by other
instructions, which round exp otherwise: then a row's result would tell how many rows there are, so blocks are padded to whole
vectors. Widths that are multiples of it need none."""


def suits(x: Tensor) -> bool:
    """Whether this form can be used: where row numbers are read without waiting for a device."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def routed_mlp(
    x: Tensor,
    ends: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    tokens: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Row m's network applied to x[tokens[m]], times weights[m], added up for every token.

    Args:
        x: [T, D]. ends: int32 [E]; network e has the rows from ends[e-1] (0 for the first) to ends[e]; there may be none.
        gate, up: [E, F, D], down: [E, D, F], in any float dtype, cast to x's for the products. gate: for swiglu only.
        activation: swiglu, down(silu(gate x) * up x); gelu (tanh form) or relu2, down(f(up x)).
        tokens: int64 [M], one network's rows all of different tokens. None: row m is token m, and nothing is weighted.
        weights: [M], fp32 or wider, with tokens.

    Returns:
        [T, D] in x's dtype, summed in fp32 or wider in the order of networks, so the same bits in every run; 0 where there are
        no rows.
    """
    assert (tokens is None) == (weights is None)
    return _RoutedMlp.apply(x, gate, up, down, weights, tokens, ends, activation)


class _RoutedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        weights: Tensor | None,
        tokens: Tensor | None,
        ends: Tensor,
        activation: str,
    ) -> Tensor:
        width, rows = up.shape[1], len(x) if tokens is None else len(tokens)
        gates = None if gate is None else x.new_empty(rows, width)
        ups = x.new_empty(rows, width)
        wide = x.dtype if tokens is None else torch.promote_types(x.dtype, torch.float32)
        y = x.new_zeros(len(x), down.shape[1], dtype=wide)
        for expert, blocks in _blocks(ends):
            w_gate = None if gate is None else gate[expert].to(x.dtype)
            w_up, w_down = up[expert].to(x.dtype), down[expert].to(x.dtype)
            for start, end in blocks:
                block = _rows(x, start, end, width, tokens)
                g = None if gates is None or w_gate is None else _multiply(block, w_gate.t(), gates[start:end])
                hidden, _ = _activate(activation, g, _multiply(block, w_up.t(), ups[start:end]))
                out = (hidden @ w_down.t())[: end - start]
                if tokens is None or weights is None:
                    y[start:end] = out
                else:  # every token once, so there is no order of additions to choose
                    y.index_add_(0, tokens[start:end], out * weights[start:end, None])
        ctx.save_for_backward(x, gates, ups, gate, up, down, weights, tokens, ends)
        ctx.activation = activation
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, ups, gate, up, down, weights, tokens, ends = ctx.saved_tensors
        wide = x.dtype if tokens is None else torch.promote_types(x.dtype, torch.float32)
        dx = torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format)
        dgate = None if gate is None else torch.empty_like(gate)
        dup, ddown, width = torch.empty_like(up), torch.empty_like(down), up.shape[1]
        dweights = None if weights is None else torch.zeros_like(weights)
        for expert, blocks in _blocks(ends):
            w_gate = None if gate is None else gate[expert].to(x.dtype)
            w_up, w_down = up[expert].to(x.dtype), down[expert].to(x.dtype)
            for number, (start, end) in enumerate(blocks):
                block, dout = (_rows(t, start, end, width, tokens) for t in (x, dy))
                g = None if gates is None else _rows(gates, start, end, width)
                u = _rows(ups, start, end, width)
                hidden, half = _activate(ctx.activation, g, u)
                dhidden = dout @ w_down
                if dweights is not None:
                    dots = torch.linalg.vecdot(dhidden.to(dweights.dtype), hidden.to(dweights.dtype))
                    dweights[start:end] = dots[: end - start]
                    scale = _rows(weights, start, end, width)[:, None]
                    dout.mul_(scale)
                    dhidden.mul_(scale)
                _outer(dout, hidden, ddown[expert], number)
                dg, du = _activate_backward(ctx.activation, dhidden, g, u, half)
                _outer(du, block, dup[expert], number)
                dblock = du @ w_up
                if dg is not None and dgate is not None and w_gate is not None:
                    _outer(dg, block, dgate[expert], number)
                    torch.addmm(dblock, dg, w_gate, out=dblock)
                if tokens is None:
                    dx[start:end] = dblock[: end - start]
                else:
                    dx.index_add_(0, tokens[start:end], dblock[: end - start].to(wide))
            if not blocks:
                for grad in (dgate, dup, ddown):
                    _ = None if grad is None else grad[expert].zero_()
        return dx.to(x.dtype), dgate, dup, ddown, dweights, None, None, None


def _blocks(ends: Tensor) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Every network's number and its blocks of rows, about equally long, so that none is left with few."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        pieces = -(-(end - start) // BLOCK)
        cuts = [start + (end - start) * piece // pieces for piece in range(pieces + 1)] if pieces else []
        yield expert, list(itertools.pairwise(cuts))
        start = end


def _rows(x: Tensor, start: int, end: int, width: int, tokens: Tensor | None = None) -> Tensor:
    """x[start:end], or x[tokens[start:end]] as a copy, with zeros up to FEW_ROWS rows and whole vectors at this width."""
    found = x[start:end] if tokens is None else x.index_select(0, tokens[start:end])
    whole = VECTOR // math.gcd(VECTOR, width)
    missing = -(-max(len(found), FEW_ROWS) // whole) * whole - len(found)
    return torch.cat([found, found.new_zeros(missing, *found.shape[1:])]) if missing else found


def _multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """rows @ matrix, kept in `out` but for padding."""
    if len(out) == len(rows):
        return torch.mm(rows, matrix, out=out)
    product = rows @ matrix
    out.copy_(product[: len(out)])
    return product


def _outer(a: Tensor, b: Tensor, out: Tensor, number: int) -> None:
    """out = a^T b for the first block of rows of a network, added in out's dtype for others."""
    if out.dtype != a.dtype:
        product = a.t() @ b
        _ = out.add_(product) if number else out.copy_(product)
    elif number:
        torch.addmm(out, a.t(), b, out=out)
    else:
        torch.mm(a.t(), b, out=out)


def _activate(activation: str, gate: Tensor | None, up: Tensor) -> tuple[Tensor, Tensor]:
    """What `down` is applied to, and what `_activate_backward` can use again."""
    if activation == "swiglu":
        assert gate is not None
        half = F.silu(gate)
        return half * up, half
    if activation == "gelu":
        return F.gelu(up, approximate="tanh"), up
    half = F.relu(up)
    return half.square(), half


def _activate_backward(
    activation: str, dhidden: Tensor, gate: Tensor | None, up: Tensor, half: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Gradients of gate and up; dhidden and half are used up."""
    if activation == "swiglu":
        dup = half.mul_(dhidden)
        dgate = torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=dhidden)
        return dgate, dup
    if activation == "gelu":
        return None, torch.ops.aten.gelu_backward(dhidden, up, approximate="tanh")
    return None, dhidden.mul_(half).mul_(2)
