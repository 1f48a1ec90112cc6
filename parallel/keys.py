"""Keys and values as an attention schedule sees them: what one rank has of them, what travels, and where gradients go.

HeadKeys    keys and values of every head travel, and their gradients come home.
LatentKeys  a compressed latent per token travels; whoever computes with it expands it into keys and values of all heads, and
            what comes home is the latent's gradient. The expansion's weight gets its gradient where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(latent [B, tokens, C], weight) -> k, v [B, tokens, H, D]; differentiable, token by token."""


class Keys(Protocol):
    """One rank's keys and values in one direction of one layer. A packed tensor is [tokens, B, slots, heads, size]."""

    @property
    def n_kv_heads(self) -> int:
        """Heads that a schedule may split."""

    @property
    def latent(self) -> int | None:
        """Entries per token of what travels, if that is not keys and values."""

    def own(self, heads: slice) -> tuple[Tensor, Tensor]:
        """This rank's k, v [B, T, heads, D]."""

    def pack(self, rows: slice, heads: slice) -> Tensor:
        """A contiguous copy of some of this rank's tokens, as it travels."""

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, tokens, heads, D] of what came."""

    def own_gradients(self, heads: slice) -> tuple[Tensor, Tensor]:
        """Accumulators of the gradients of `own`, to add to."""

    def gradients_of(self, packed: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """Accumulators for what came (dk, dv, zero), and what makes of them the packed gradient that goes home."""

    def fold(self, rows: slice, heads: slice, arrived: Tensor) -> None:
        """Add a packed gradient of some of this rank's tokens."""

    def gradients(self, whole: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Gradients of the tensors that this was made of, from the accumulators or from complete (dk, dv) of `own`."""


class HeadKeys:
    """k, v [B, T, Hkv, D]."""

    latent: int | None = None

    def __init__(self, k: Tensor, v: Tensor, wide: torch.dtype) -> None:
        self.k, self.v, self.wide, self.n_kv_heads = k, v, wide, k.shape[2]
        self._into: tuple[Tensor, Tensor] | None = None

    def own(self, heads: slice) -> tuple[Tensor, Tensor]:
        """See Keys."""
        return self.k[:, :, heads], self.v[:, :, heads]

    def pack(self, rows: slice, heads: slice) -> Tensor:
        """Slots: k, v."""
        return torch.stack([self.k[:, rows, heads], self.v[:, rows, heads]], dim=2).transpose(0, 1).contiguous()

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """See Keys; views."""
        return packed[:, :, 0].transpose(0, 1), packed[:, :, 1].transpose(0, 1)

    def own_gradients(self, heads: slice) -> tuple[Tensor, Tensor]:
        """See Keys."""
        dk, dv = self._accumulators()
        return dk[:, :, heads], dv[:, :, heads]

    def gradients_of(self, packed: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """See Keys."""
        joint = k.new_zeros(k.shape[1], k.shape[0], 2, *k.shape[2:], dtype=self.wide)
        return *self.unpack(joint), lambda: joint

    def fold(self, rows: slice, heads: slice, arrived: Tensor) -> None:
        """See Keys."""
        for total, part in zip(self._accumulators(), self.unpack(arrived), strict=True):
            total[:, rows, heads] += part

    def gradients(self, whole: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Of k and v."""
        return self._accumulators() if whole is None else whole

    def _accumulators(self) -> tuple[Tensor, Tensor]:
        if self._into is None:
            self._into = torch.zeros_like(self.k, dtype=self.wide), torch.zeros_like(self.v, dtype=self.wide)
        return self._into


class LatentKeys:
    """A latent [B, T, C] and the weight that expands it. All heads share the latent, so schedules see one KV head."""

    n_kv_heads = 1

    def __init__(self, latent: Tensor, weight: Tensor, expand: Expand, wide: torch.dtype) -> None:
        self._latent, self._weight, self._expand, self.wide = latent, weight, expand, wide
        self.latent = latent.shape[-1]
        self._own: tuple[Tensor, Tensor] | None = None
        self._into: tuple[Tensor, Tensor] | None = None
        self._dlatent = torch.zeros_like(latent, dtype=wide)
        self._dweight = torch.zeros_like(weight, dtype=wide)

    def own(self, heads: slice) -> tuple[Tensor, Tensor]:
        """See Keys; expanded once."""
        if self._own is None:
            self._own = self._expand(self._latent, self._weight)
        return self._own

    def pack(self, rows: slice, heads: slice) -> Tensor:
        """One slot, one head."""
        return self._latent[:, rows].transpose(0, 1)[:, :, None, None].contiguous()

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """See Keys."""
        return self._expand(packed[:, :, 0, 0].transpose(0, 1), self._weight)

    def own_gradients(self, heads: slice) -> tuple[Tensor, Tensor]:
        """See Keys."""
        if self._into is None:
            self._into = self._zeros(*self.own(heads))
        return self._into

    def gradients_of(self, packed: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
        """See Keys."""
        latent = packed[:, :, 0, 0].transpose(0, 1)
        dk, dv = self._zeros(*(torch.empty_like(k) for _ in range(2)))

        def homeward() -> Tensor:
            return self._compress(latent, dk, dv).transpose(0, 1)[:, :, None, None].contiguous()

        return dk, dv, homeward

    def fold(self, rows: slice, heads: slice, arrived: Tensor) -> None:
        """See Keys."""
        self._dlatent[:, rows] += arrived[:, :, 0, 0].transpose(0, 1)

    def gradients(self, whole: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        """Of the latent and of the weight."""
        pair = self._into if whole is None else whole
        if pair is not None:
            self._dlatent += self._compress(self._latent, *pair)
            self._into = None
        return self._dlatent, self._dweight

    def _zeros(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(k, dtype=self.wide), torch.zeros_like(v, dtype=self.wide)

    def _compress(self, latent: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        """The latent's gradient, wide; the weight's is added up here."""
        with torch.enable_grad():
            leaves: list[Any] = [latent.detach().requires_grad_(), self._weight.detach().requires_grad_()]
            k, v = self._expand(*leaves)
        dlatent, dweight = torch.autograd.grad((k, v), leaves, (dk.to(k.dtype), dv.to(v.dtype)))
        self._dweight += dweight
        return dlatent.to(self.wide)
