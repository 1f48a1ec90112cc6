"""A scan cut into chunks and panels of chunks: the walk over them, their decays, and the shapes in which products are formed.

Running sums of dt are fp64, and their differences are formed from two fp32 halves: behind a long step a plain fp32 difference
would lose its digits. A sum restarts where a document does, so that no token of one document can change a bit of another's
result. Decays are powers of 2, which torch computes four times as fast as those of e, and a hundred times as fast where they
vanish; below 2^-100 they count as 0, because processors are slow with subnormal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain.kernels.ssd.merge import Summary

PANEL = 1 << 18
"""Entries of the q x q products that exist at once on a CPU: they should stay in the cache."""

GPU_PANEL = 1 << 24
"""The same on a GPU, where it is launches that must be few: 64 MiB in fp32."""

SMALLEST = {torch.float32: -100.0, torch.float64: -1000.0}
"""Exponent of 2 below which a decay counts as 0."""


class Panel(NamedTuple):
    """Some chunks of some rows."""

    rows: slice
    chunks: slice
    tokens: slice
    q: int
    """Tokens per chunk."""

    def of(self, t: Tensor) -> Tensor:
        """[R, T, ...] -> its part [r, k, q, ...]."""
        return t[self.rows, self.tokens].unflatten(1, (-1, self.q))


class Decays(NamedTuple):
    """Of the chunks in a panel, q tokens each."""

    same: Tensor  # fp64 [r|1, k|1, q, q]: 1 for tokens j <= i of one document
    elapsed: Tensor  # fp64 [r|1, k|1, q, H|1]: sum of dt over the chunk's tokens of this document so far
    from_start: Tensor  # [r, k, q, H]: what of the entering state a token still sees
    to_end: Tensor  # [r, k, q, H]: what of a token the leaving state still holds
    through: Tensor  # [r, k, H]: what of the entering state the leaving state still holds


class Problem:
    """Sizes, the walk over panels, and what of dt, A and resets a panel needs."""

    def __init__(self, x: Tensor, dt: Tensor | None, A: Tensor, B: Tensor, resets: Tensor | None, chunk: int) -> None:
        self.rows, self.tokens, self.heads, self.size = x.shape
        self.groups, self.state = B.shape[2:]
        assert self.heads % self.groups == 0, (self.heads, self.groups)
        self.each = self.heads // self.groups
        self.x, self.dt, self.A, self.resets, self.chunk = x, dt, A, resets, chunk
        self.rate = A.double() / math.log(2)  # decays are powers of 2
        self.chunks = -(-self.tokens // chunk)
        self.dtype = torch.promote_types(x.dtype, torch.float32)

    def panels(self) -> Iterator[Panel]:
        """Cover all rows and chunks; the last chunks of rows, if shorter, make panels of their own."""
        full, rest = divmod(self.tokens, self.chunk)
        entries = GPU_PANEL if self.x.is_cuda else PANEL
        for q, first, end in ((self.chunk, 0, full), (rest, full, full + 1)):
            if q == 0 or first == end:
                continue
            each = self.heads * q * q
            height = min(self.rows, max(1, entries // each))
            width = max(1, entries // max(1, each * height))
            for row in range(0, self.rows, height):
                for start in range(first, end, width):
                    stop = min(start + width, end)
                    tokens = slice(start * self.chunk, start * self.chunk + (stop - start) * q)
                    yield Panel(slice(row, row + height), slice(start, stop), tokens, q)

    def decays(self, panel: Panel) -> Decays:
        """Of one panel."""
        device, q = self.x.device, panel.q
        same = torch.ones(q, q, dtype=torch.bool, device=device).tril()
        ones = torch.ones(1, 1, q, 1, dtype=torch.float64, device=device)
        steps = ones if self.dt is None else panel.of(self.dt).double()
        if self.resets is None:
            weights = same.double()[None, None]
            elapsed = weights @ steps
            from_start = elapsed * self.rate
            to_end, through = from_start[:, :, -1:] - from_start, from_start[:, :, -1].clone()
        else:
            document = panel.of(self.resets).cumsum(2)
            weights = (same & (document[..., :, None] == document[..., None, :])).double()
            elapsed = weights @ steps
            exponent = elapsed * self.rate
            first, final = (document == 0)[..., None], (document == document[..., -1:])[..., None]
            from_start = torch.where(first, exponent, -torch.inf)
            to_end = torch.where(final, exponent[:, :, -1:] - exponent, -torch.inf)
            through = from_start[:, :, -1].clone()
        return Decays(weights, elapsed, *(self.power(t).to(self.dtype) for t in (from_start, to_end, through)))

    def power(self, exponent: Tensor) -> Tensor:
        """2^exponent, for exponents up to 0 (overwritten)."""
        return torch.threshold_(exponent, SMALLEST[self.dtype], -torch.inf).exp2_()

    def between(self, decays: Decays) -> tuple[Tensor, Tensor]:
        """For a document's tokens j <= i: exp(A dt) over the time from j to i, else 0, [r|1, k|1, H, q, q]; and that time."""
        elapsed = decays.elapsed.transpose(2, 3)
        high = elapsed.to(self.dtype)
        apart = high[..., :, None] - high[..., None, :]
        if self.dtype != torch.float64:
            low = (elapsed - high).to(self.dtype)
            apart += low[..., :, None]
            apart -= low[..., None, :]
        nothing = torch.zeros_like(decays.same, dtype=self.dtype).masked_fill_(decays.same == 0, -torch.inf)
        exponent = torch.addcmul(nothing.unsqueeze(2), apart, self.rate.to(self.dtype)[:, None, None])
        return self.power(exponent), apart

    def values(self, panel: Panel) -> tuple[Tensor, Tensor]:
        """x and v = dt x in the dtype of computation, [r, k, q, H, P]."""
        x = panel.of(self.x).to(self.dtype)
        if self.dt is None:
            return x, x
        return x, x * panel.of(self.dt).to(self.dtype).unsqueeze(-1)

    def grouped(self, t: Tensor, panel: Panel) -> Tensor:
        """B or C as [r, k, G, q, N]."""
        return panel.of(t).to(self.dtype).transpose(2, 3)

    def by_group(self, t: Tensor) -> Tensor:
        """[r, k, q, H, P] -> [r, k, G, q, H/G P]: all heads that share B and C in one product."""
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
