"""The state-space recurrence in chunks (Dao and Gu 2024, section 6): batched matrix products, memory linear in length.

A sequence is cut into chunks of Q tokens. With c the running sum of dt A within a chunk and v = dt x:
    added      sum_j exp(c_Q - c_j) v_j B_j^T             what the chunk leaves behind,
    state'     exp(c_Q) state + added                     from chunk to chunk,
    y_i        sum_{j<=i} exp(c_i - c_j) (C_i . B_j) v_j + exp(c_i) state C_i + D x_i.
Only the states between chunks exist for the whole length; the Q x Q products live for a few chunks at a time (a panel) and are
formed anew in backward.

Documents: where one starts, every pair of tokens across the border is masked out of the sums above. The running sum restarts
there too, so that no token of one document can change a bit of another's result.

Numerics: everything is computed in fp32 (fp64 for fp64), whatever the dtype of the inputs. Running sums are fp64, and their
differences are formed from two fp32 halves: behind tokens with strong decay a plain fp32 difference would lose its digits.
Decays are powers of 2, which torch computes four times as fast as those of e, and a hundred times as fast where they vanish;
below 2^-100 they count as 0, because processors are slow with subnormal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lctrain.kernels.ssd.merge import Summary

CHUNK = 128
"""Tokens per chunk: the fastest on CPU for heads of 64 and states of 128."""

PANEL = 1 << 18
"""Entries of the Q x Q products that exist at once: they should stay in the cache."""

_SMALLEST = {torch.float32: -100.0, torch.float64: -1000.0}
"""Exponent of 2 below which a decay counts as 0."""


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


class _Decays(NamedTuple):
    """Of the chunks in a panel, q tokens each; `same` [R|1, k|1, q, q]: a document's tokens j <= i, fp64."""

    same: Tensor
    running: Tensor  # c / log 2, fp64 [R, k, q, H]
    from_start: Tensor  # [R, k, q, H]: what of the entering state a token still sees
    to_end: Tensor  # [R, k, q, H]: what of a token the leaving state still holds
    through: Tensor  # [R, k, H]: what of the entering state the leaving state still holds


class _Problem:
    """Sizes, the walk over panels, and what of dt, A and resets a panel needs."""

    def __init__(self, x: Tensor, dt: Tensor | None, A: Tensor, B: Tensor, resets: Tensor | None, chunk: int) -> None:
        self.rows, self.tokens, self.heads, self.size = x.shape
        self.groups, self.state = B.shape[2:]
        assert self.heads % self.groups == 0, (self.heads, self.groups)
        self.each = self.heads // self.groups
        self.x, self.dt, self.A, self.resets, self.chunk = x, dt, A, resets, chunk
        self.chunks = -(-self.tokens // chunk)
        self.dtype = torch.promote_types(x.dtype, torch.float32)

    def panels(self) -> Iterator[tuple[slice, slice, int]]:
        """(chunks, tokens, tokens per chunk) of every panel; the last chunk, if shorter, is a panel of its own."""
        full, size = self.tokens // self.chunk, self.chunk
        step = max(1, PANEL // max(1, self.rows * self.heads * size * size))
        for first in range(0, full, step):
            last = min(first + step, full)
            yield slice(first, last), slice(first * size, last * size), size
        if self.chunks > full:
            yield slice(full, self.chunks), slice(full * size, self.tokens), self.tokens - full * size

    def decays(self, tokens: slice, q: int) -> _Decays:
        """Of one panel."""
        device = self.x.device
        same = torch.ones(q, q, dtype=torch.bool, device=device).tril()
        if self.dt is None:
            steps = torch.ones(1, 1, q, 1, dtype=torch.float64, device=device)
        else:
            steps = self.dt[:, tokens].double().unflatten(1, (-1, q))
        growth = steps * (self.A.double() / math.log(2))
        if self.resets is None:
            weights = same.double()[None, None]
            running = weights @ growth
            last = running[:, :, -1:]
            from_start, to_end, through = running, last - running, last[:, :, 0]
        else:
            document = self.resets[:, tokens].unflatten(1, (-1, q)).cumsum(2)
            weights = (same & (document[..., :, None] == document[..., None, :])).double()
            running = weights @ growth
            last = running[:, :, -1:]
            first, final = (document == 0)[..., None], (document == document[..., -1:])[..., None]
            from_start = torch.where(first, running, -torch.inf)
            to_end = torch.where(final, last - running, -torch.inf)
            through = torch.where(first[:, :, -1], last[:, :, 0], -torch.inf)
        return _Decays(weights, running, *(self.power(t.to(self.dtype, copy=True)) for t in (from_start, to_end, through)))

    def power(self, exponent: Tensor) -> Tensor:
        """2^exponent, for exponents up to 0 (overwritten)."""
        return torch.threshold_(exponent, _SMALLEST[self.dtype], -torch.inf).exp2_()

    def between(self, decays: _Decays) -> Tensor:
        """exp(c_i - c_j) for a document's tokens j <= i, else 0: [R|1, k|1, H, q, q]."""
        running = decays.running.transpose(2, 3)
        high = running.to(self.dtype)
        difference = high[..., :, None] - high[..., None, :]
        if self.dtype != torch.float64:
            low = (running - high).to(self.dtype)
            difference += low[..., :, None]
            difference -= low[..., None, :]
        nothing = torch.zeros_like(decays.same, dtype=self.dtype).masked_fill_(decays.same == 0, -torch.inf)
        return self.power(difference.add_(nothing.unsqueeze(2)))

    def values(self, tokens: slice, q: int) -> tuple[Tensor, Tensor]:
        """x and v = dt x in the dtype of computation, [R, k, q, H, P]."""
        x = self.x[:, tokens].to(self.dtype).unflatten(1, (-1, q))
        if self.dt is None:
            return x, x
        return x, x * self.dt[:, tokens].to(self.dtype).unflatten(1, (-1, q)).unsqueeze(-1)

    def grouped(self, t: Tensor, tokens: slice, q: int) -> Tensor:
        """B or C as [R, k, G, q, N]."""
        return t[:, tokens].to(self.dtype).unflatten(1, (-1, q)).transpose(2, 3)

    def by_group(self, t: Tensor) -> Tensor:
        """[R, k, q, H, P] -> [R, k, G, q, H/G P]: all heads that share B and C in one product."""
        return t.unflatten(3, (self.groups, self.each)).flatten(4).transpose(2, 3)

    def by_head(self, t: Tensor) -> Tensor:
        """Inverse of by_group."""
        return t.transpose(2, 3).unflatten(4, (self.each, self.size)).flatten(3, 4)

    def spread(self, per_head: Tensor) -> Tensor:
        """A number per head, [..., H], as a factor of states [..., G, N, H/G P]."""
        return per_head.unflatten(-1, (self.groups, 1, self.each)).repeat_interleave(self.size, dim=-1)

    def inside(self, state: Tensor) -> Tensor:
        """State [R, H, P, N] as it is kept here, [R, G, N, H/G P]."""
        return state.to(self.dtype).unflatten(1, (self.groups, self.each)).permute(0, 1, 4, 2, 3).flatten(3)

    def outside(self, state: Tensor) -> Tensor:
        """Inverse of inside."""
        return state.unflatten(3, (self.each, self.size)).permute(0, 1, 3, 4, 2).flatten(1, 2)

    def empty_states(self) -> Tensor:
        """Room for the states before every chunk and after the last, [R, chunks + 1, G, N, H/G P]."""
        shape = (self.rows, self.chunks + 1, self.groups, self.state, self.each * self.size)
        return self.x.new_empty(shape, dtype=self.dtype)

    def total(self, through: Tensor, added: Tensor, backwards: bool = False) -> Summary:
        """The summary of whole rows from those of their chunks: through [R, chunks, H], added [R, chunks, G, N, H/G P]."""
        total = added.new_zeros(self.rows, *added.shape[2:])
        factor = self.spread(through)
        order = range(self.chunks)
        for c in reversed(order) if backwards else order:
            total.mul_(factor[:, c]).add_(added[:, c])
        return Summary(through.prod(dim=1), self.outside(total))


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, resets, chunk, relay):
        problem = _Problem(x, dt, A, B, resets, chunk)
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
        problem = _Problem(x, dt, A, B, resets, ctx.chunk)
        dy = torch.zeros_like(x) if dy is None else dy
        dstates = problem.empty_states()
        _seen(problem, C, dy, dstates[:, :-1])
        if ctx.relay is not None:
            dfinal = ctx.relay.backward(problem.total(through, dstates[:, :-1], backwards=True))
        dstates[:, -1] = 0 if dfinal is None else problem.inside(dfinal)
        factor = problem.spread(through)
        for c in reversed(range(problem.chunks)):
            dstates[:, c].addcmul_(factor[:, c], dstates[:, c + 1])
        dx, ddt, dA, dB, dC, dD = _gradients(problem, B, C, D, dy, states, dstates)
        dinitial = problem.outside(dstates[:, 0]) if ctx.needs_input_grad[6] else None
        return dx, ddt, dA, dB, dC, dD, dinitial, None, None, None


def _added(problem: _Problem, B: Tensor, out: Tensor) -> Tensor:
    """Fill `out` [R, chunks, G, N, H/G P] with what each chunk leaves behind; returns what it lets through, [R, chunks, H]."""
    through = out.new_empty(problem.rows, problem.chunks, problem.heads)
    for chunks, tokens, q in problem.panels():
        decays = problem.decays(tokens, q)
        through[:, chunks] = decays.through
        _, v = problem.values(tokens, q)
        held = problem.by_group(v * decays.to_end.unsqueeze(-1))
        out[:, chunks] = problem.grouped(B, tokens, q).transpose(-1, -2) @ held
    return through


def _seen(problem: _Problem, C: Tensor, dy: Tensor, out: Tensor) -> None:
    """Fill `out` with the gradient of the state entering each chunk, as far as it comes from the chunk's own outputs."""
    for chunks, tokens, q in problem.panels():
        slope = dy[:, tokens].to(problem.dtype).unflatten(1, (-1, q)) * problem.decays(tokens, q).from_start.unsqueeze(-1)
        out[:, chunks] = problem.grouped(C, tokens, q).transpose(-1, -2) @ problem.by_group(slope)


def _outputs(problem: _Problem, B: Tensor, C: Tensor, D: Tensor | None, states: Tensor) -> Tensor:
    y = torch.empty_like(problem.x)
    for chunks, tokens, q in problem.panels():
        decays = problem.decays(tokens, q)
        x, v = problem.values(tokens, q)
        c = problem.grouped(C, tokens, q)
        scores = c @ problem.grouped(B, tokens, q).transpose(-1, -2)  # R k G q q
        mixing = _mix(problem.between(decays), scores)
        out = problem.by_head(c @ states[:, chunks]).mul_(decays.from_start.unsqueeze(-1))
        out += (mixing @ v.transpose(2, 3)).transpose(2, 3)
        if D is not None:
            out.addcmul_(x, D.to(x.dtype).unsqueeze(-1))
        y[:, tokens] = out.flatten(1, 2)
    return y


def _mix(between: Tensor, scores: Tensor) -> Tensor:
    """[R|1, k|1, H, q, q] times [R, k, G, q, q], each group's scores for all of its heads: [R, k, H, q, q]."""
    groups = scores.shape[2]
    return (between.unflatten(2, (groups, -1)) * scores.unsqueeze(3)).flatten(2, 3)


def _gradients(problem: _Problem, B: Tensor, C: Tensor, D: Tensor | None, dy: Tensor, states: Tensor, dstates: Tensor):
    """Of x, dt, A, B, C, D, given the states before (states[:, c]) and after (states[:, c + 1]) chunk c and their gradients."""
    x_all, dt_all, wide = problem.x, problem.dt, problem.dtype
    dx, dB, dC = (torch.empty_like(t) for t in (x_all, B, C))
    ddt = None if dt_all is None else torch.empty_like(dt_all)
    dA, dD = (problem.A.new_zeros(problem.heads, dtype=torch.float64) for _ in range(2))
    for chunks, tokens, q in problem.panels():
        decays = problem.decays(tokens, q)
        before = states[:, chunks]
        dafter = dstates[:, chunks.start + 1 : chunks.stop + 1]
        x, v = problem.values(tokens, q)
        slope = dy[:, tokens].to(wide).unflatten(1, (-1, q))
        b, c = problem.grouped(B, tokens, q), problem.grouped(C, tokens, q)
        scores = c @ b.transpose(-1, -2)
        between = problem.between(decays)
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
        entering = torch.mul(problem.by_head(c @ before), seen).sum(-1)  # R k q H
        dC[:, tokens] = _tokens(problem.by_group(seen) @ before.transpose(-1, -2) + dscores @ b)
        dB[:, tokens] = _tokens(problem.by_group(held) @ dafter.transpose(-1, -2) + dscores.transpose(-1, -2) @ c)
        dheld = problem.by_head(b @ dafter)
        leaving = (held * dheld).sum(-1)
        dv = torch.addcmul(dv, dheld, decays.to_end.unsqueeze(-1))
        # The decay of token t lies on the way from j < t to i >= t, from the state before to i >= t, from j < t to the state
        # after, and from state to state. Sums over i and j of the same products: what must cancel does so exactly.
        inner = ((pairs.sum(-1) - pairs.sum(-2)).transpose(2, 3) + entering).double()
        leaving = leaving.double()
        dgrowth = decays.same.transpose(-1, -2) @ inner + (decays.same @ leaving - leaving)
        dgrowth += (decays.through * _per_head(problem, before * dafter)).unsqueeze(2)
        if dt_all is None:
            dA += dgrowth.sum((0, 1, 2))
        else:
            assert ddt is not None
            steps = dt_all[:, tokens].unflatten(1, (-1, q))
            # Nothing passes such a token; what rounding left of it would be multiplied with its large step.
            dgrowth.masked_fill_(steps * problem.A < _SMALLEST[wide] * math.log(2), 0.0)
            dA += (dgrowth * steps).sum((0, 1, 2))
            ddt[:, tokens] = ((x * dv).sum(-1) + dgrowth * problem.A.double()).flatten(1, 2).to(ddt.dtype)
            dv *= steps.to(wide).unsqueeze(-1)
        if D is not None:
            dD += (slope * x).sum(-1).sum((0, 1, 2), dtype=torch.float64)
            dv.addcmul_(slope, D.to(wide).unsqueeze(-1))
        dx[:, tokens] = dv.flatten(1, 2)
    return dx, ddt, dA.to(problem.A.dtype), dB, dC, None if D is None else dD.to(D.dtype)


def _tokens(t: Tensor) -> Tensor:
    """[R, k, G, q, N] -> [R, k q, G, N]."""
    return t.transpose(2, 3).flatten(1, 2)


def _per_head(problem: _Problem, t: Tensor) -> Tensor:
    """[R, k, G, N, H/G P] summed for each head: [R, k, H]."""
    return t.sum(3).unflatten(3, (problem.each, problem.size)).sum(-1).flatten(2, 3)
