"""The state-space recurrence in chunks (Dao and Gu 2024, section 6): batched matrix products, memory linear in length.

A sequence is cut into chunks of Q tokens. With c the running sum of dt A within a chunk and v = dt x:
    added      sum_j exp(c_Q - c_j) v_j B_j^T             what the chunk leaves behind,
    state'     exp(c_Q) state + added                     from chunk to chunk,
    y_i        sum_{j<=i} exp(c_i - c_j) (C_i . B_j) v_j + exp(c_i) state C_i + D x_i.
Only the states between chunks exist for the whole length; the Q x Q products live for a few chunks at a time (a panel) and are
formed anew in backward.

Documents: where one starts, every pair of tokens across the border is masked out of the sums above, and c restarts.

Numerics: everything is computed in fp32 (fp64 for fp64), whatever the dtype of the inputs; for decays see panels.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lctrain.kernels.ssd.merge import Summary
from lctrain.kernels.ssd.panels import Problem

CHUNK = 128
"""Tokens per chunk: for states of 128, as many numbers as x has are kept for backward. On CPU 64 is faster and keeps twice."""


class Relay(Protocol):
    """How states reach rows that continue other rows (of this process or another), for `ssd(relay=)`."""

    def forward(self, rows: Summary) -> Tensor:
        """State that enters each row [R, H, P, N], given what each row does to a state."""

    def backward(self, rows: Summary) -> Tensor:
        """Gradient of the state that leaves each row; `added` is what the row itself adds to that of its entering state."""


def ssd(
    x: Tensor,
    dt: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    chunk: int = CHUNK,
    relay: Relay | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t, per head; differentiable in every float argument.

    Args:
        x: [R, T, H, P] in any float dtype; T may be 0.
        dt: [R, T, H], step sizes, or None for 1 everywhere. A: [H], at most 0.
        B, C: [R, T, G, N]; head h uses group h // (H / G).
        D: [H] or None.
        initial_state: [R, H, P, N] or None for zeros.
        resets: bool [R, T], True where a document starts and forgets the state before; None: nowhere.
        chunk: tokens per chunk.
        relay: decides the states that enter the rows, instead of initial_state.

    Returns:
        y [R, T, H, P] in x's dtype, and the state after the last token [R, H, P, N] in fp32 (fp64 for fp64), through which
        gradients flow unless there is a relay.
    """
    assert relay is None or initial_state is None
    return _Ssd.apply(x, dt, A, B, C, D, initial_state, resets, chunk, relay)


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, resets, chunk, relay):
        problem = Problem(x, dt, A, B, resets, chunk)
        states = problem.empty_states()
        through = _added(problem, B, states[:, 1:])
        if relay is not None:
            initial_state = relay.forward(problem.total(through, states[:, 1:]))
        states[:, 0] = 0 if initial_state is None else problem.inside(initial_state)
        factor = problem.spread(through)
        for c in range(problem.chunks):
            states[:, c + 1].addcmul_(factor[:, c], states[:, c])
        y = _outputs(problem, B, C, D, states)
        ctx.save_for_backward(x, dt, A, B, C, D, resets, states, through)
        ctx.chunk, ctx.relay = chunk, relay
        final = problem.outside(states[:, -1]).contiguous()
        if relay is not None:
            ctx.mark_non_differentiable(final)
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, dt, A, B, C, D, resets, states, through = ctx.saved_tensors
        problem = Problem(x, dt, A, B, resets, ctx.chunk)
        dy = torch.zeros_like(x) if dy is None else dy
        dstates = problem.empty_states()
        _seen(problem, C, dy, dstates[:, :-1])
        if ctx.relay is not None:
            dfinal = ctx.relay.backward(problem.total(through, dstates[:, :-1], backwards=True))
        dstates[:, -1] = 0 if dfinal is None else problem.inside(dfinal)
        factor = problem.spread(through)
        for c in reversed(range(problem.chunks)):
            dstates[:, c].addcmul_(factor[:, c], dstates[:, c + 1])
        dx, ddt, dA, dB, dC, dD = _gradients(problem, B, C, D, dy, states, dstates, ctx.needs_input_grad[2])
        dinitial = problem.outside(dstates[:, 0]) if ctx.needs_input_grad[6] else None
        return dx, ddt, dA, dB, dC, dD, dinitial, None, None, None


def _added(problem: Problem, B: Tensor, out: Tensor) -> Tensor:
    """Fill `out` [R, chunks, G, N, H/G P] with what each chunk leaves behind; returns what it lets through, [R, chunks, H]."""
    through = out.new_empty(problem.rows, problem.chunks, problem.heads)
    for panel in problem.panels():
        decays = problem.decays(panel)
        through[panel.rows, panel.chunks] = decays.through
        _, v = problem.values(panel)
        held = problem.by_group(v * decays.to_end.unsqueeze(-1))
        out[panel.rows, panel.chunks] = problem.grouped(B, panel).transpose(-1, -2) @ held
    return through


def _seen(problem: Problem, C: Tensor, dy: Tensor, out: Tensor) -> None:
    """Fill `out` with the gradient of the state entering each chunk, as far as it comes from the chunk's own outputs."""
    for panel in problem.panels():
        slope = panel.of(dy).to(problem.dtype) * problem.decays(panel).from_start.unsqueeze(-1)
        out[panel.rows, panel.chunks] = problem.grouped(C, panel).transpose(-1, -2) @ problem.by_group(slope)


def _outputs(problem: Problem, B: Tensor, C: Tensor, D: Tensor | None, states: Tensor) -> Tensor:
    y = torch.empty_like(problem.x)
    for panel in problem.panels():
        decays = problem.decays(panel)
        x, v = problem.values(panel)
        c = problem.grouped(C, panel)
        scores = c @ problem.grouped(B, panel).transpose(-1, -2)  # r k G q q
        mixing = _mix(problem.between(decays)[0], scores)
        out = problem.by_head(c @ states[panel.rows, panel.chunks]).mul_(decays.from_start.unsqueeze(-1))
        out += (mixing @ v.transpose(2, 3)).transpose(2, 3)
        if D is not None:
            out.addcmul_(x, D.to(x.dtype).unsqueeze(-1))
        y[panel.rows, panel.tokens] = out.flatten(1, 2)
    return y


def _mix(between: Tensor, scores: Tensor) -> Tensor:
    """[r|1, k|1, H, q, q] times [r, k, G, q, q], each group's scores for all of its heads: [r, k, H, q, q]."""
    groups = scores.shape[2]
    return (between.unflatten(2, (groups, -1)) * scores.unsqueeze(3)).flatten(2, 3)


def _gradients(
    problem: Problem, B: Tensor, C: Tensor, D: Tensor | None, dy: Tensor, states: Tensor, dstates: Tensor, need_dA: bool
):
    """Of x, dt, A, B, C, D, given the states before (states[:, c]) and after (states[:, c + 1]) chunk c and their gradients."""
    x_all, dt_all, wide = problem.x, problem.dt, problem.dtype
    dx, dB, dC = (torch.empty_like(t) for t in (x_all, B, C))
    ddt = None if dt_all is None else torch.empty_like(dt_all)
    dA, dD = (problem.A.new_zeros(problem.heads, dtype=torch.float64) for _ in range(2))
    for panel in problem.panels():
        decays = problem.decays(panel)
        before = states[panel.rows, panel.chunks]
        dafter = dstates[panel.rows, panel.chunks.start + 1 : panel.chunks.stop + 1]
        x, v = problem.values(panel)
        slope = panel.of(dy).to(wide)
        b, c = problem.grouped(B, panel), problem.grouped(C, panel)
        scores = c @ b.transpose(-1, -2)
        between, apart = problem.between(decays)
        slope_h, v_h = (t.transpose(2, 3).contiguous() for t in (slope, v))
        # Within the chunk.
        dv = (_mix(between, scores).transpose(-1, -2) @ slope_h).transpose(2, 3)
        weighted = (slope_h @ v_h.transpose(-1, -2)).mul_(between)
        by_scores = weighted.unflatten(2, (problem.groups, problem.each))
        dscores = by_scores.sum(3) if problem.each > 1 else by_scores[:, :, :, 0].clone()
        pairs = by_scores.mul_(scores.unsqueeze(3)).flatten(2, 3)
        pairs.diagonal(dim1=-2, dim2=-1).zero_()  # a token's own value does not decay
        # Through the state before and the state after.
        seen = slope * decays.from_start.unsqueeze(-1)
        held = v * decays.to_end.unsqueeze(-1)
        entering = torch.mul(problem.by_head(c @ before), seen).sum(-1)  # r k q H
        dC[panel.rows, panel.tokens] = _tokens(problem.by_group(seen) @ before.transpose(-1, -2) + dscores @ b)
        dB[panel.rows, panel.tokens] = _tokens(
            problem.by_group(held) @ dafter.transpose(-1, -2) + dscores.transpose(-1, -2) @ c
        )
        dheld = problem.by_head(b @ dafter)
        leaving = (held * dheld).sum(-1)
        dv = torch.addcmul(dv, dheld, decays.to_end.unsqueeze(-1))
        # The decay of token t lies on the way from j < t to i >= t, from the state before to i >= t, from j < t to the state
        # after, and from state to state.
        passing = decays.through * _per_head(problem, before * dafter)
        if dt_all is not None:
            assert ddt is not None
            inner = ((pairs.sum(-1) - pairs.sum(-2)).transpose(2, 3) + entering).double()
            dgrowth = decays.same.transpose(-1, -2) @ inner + (decays.same @ leaving.double() - leaving) + passing.unsqueeze(2)
            ddt[panel.rows, panel.tokens] = ((x * dv).sum(-1) + dgrowth * problem.A.double()).flatten(1, 2).to(ddt.dtype)
            dv *= panel.of(dt_all).to(wide).unsqueeze(-1)
        if need_dA:  # every product with the time that it took: no two large sums are subtracted
            last = decays.elapsed[:, :, -1:]
            dA += (pairs * apart).sum((-1, -2)).sum((0, 1), dtype=torch.float64)
            dA += (entering * decays.elapsed + leaving * (last - decays.elapsed)).sum((0, 1, 2))
            dA += (passing * last[:, :, 0]).sum((0, 1))
        if D is not None:
            dD += (slope * x).sum(-1).sum((0, 1, 2), dtype=torch.float64)
            dv.addcmul_(slope, D.to(wide).unsqueeze(-1))
        dx[panel.rows, panel.tokens] = dv.flatten(1, 2)
    return dx, ddt, dA.to(problem.A.dtype) if need_dA else None, dB, dC, None if D is None else dD.to(D.dtype)


def _tokens(t: Tensor) -> Tensor:
    """[r, k, G, q, N] -> [r, k q, G, N]."""
    return t.transpose(2, 3).flatten(1, 2)


def _per_head(problem: Problem, t: Tensor) -> Tensor:
    """[r, k, G, N, H/G P] summed for each head: [r, k, H]."""
    return t.sum(3).unflatten(3, (problem.each, problem.size)).sum(-1).flatten(2, 3)
