"""What travels with an item, tensor by tensor: the one description that buffers, messages and byte counts come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from lctrain.kernels.attention.fused import accumulation_dtype
from lctrain.parallel.heads import HeadSplit, split_heads
from lctrain.parallel.schedule import Direction, Schedule


class Terms(Protocol):
    """What a Schedule and every rank's AttentionPlan of it say of all items alike; see Schedule."""

    @property
    def direction(self) -> Direction:
        """Forward or backward."""

    @property
    def slices(self) -> int:
        """Parts into which the heads are split."""

    @property
    def rounded(self) -> tuple[str, ...]:
        """Kinds of gradients that travel in the inputs' dtype."""


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes that do not depend on the sequence: q is [batch, tokens, n_heads, head_dim], k and v have n_kv_heads.

    latent: entries per token of the compressed latent that travels instead of k and v; None: these travel themselves.
    """

    batch: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    latent: int | None = None

    @property
    def travelling_heads(self) -> int:
        """KV heads that a schedule may split; a latent belongs to all heads at once."""
        return self.n_kv_heads if self.latent is None else 1

    @property
    def kv_size(self) -> tuple[int, int]:
        """Slots and their entries per travelling KV head and token: keys and values, or the latent."""
        return (2, self.head_dim) if self.latent is None else (1, self.latent)

    def split(self, slices: int) -> HeadSplit:
        """The heads in `slices` parts; every part needs the whole latent."""
        if self.latent is None:
            return split_heads(self.n_heads, self.n_kv_heads, slices)
        q = split_heads(self.n_heads, self.n_heads, slices).q
        return HeadSplit(q, tuple((0, 1) if b > a else (0, 0) for a, b in q), self.n_heads)


class Part(NamedTuple):
    """One tensor of an item: [tokens, *tail], contiguous, tokens first so that any run of tokens is contiguous too."""

    tail: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's entries."""
        return math.prod(self.tail) * self.dtype.itemsize


def payload(
    kind: str, direction: Direction, shape: AttentionShape, split: HeadSplit, heads: int, rounded: Sequence[str] = ()
) -> tuple[Part, ...]:
    """The tensors of an item of this kind for one slice of the heads.

    Inputs and partial outputs travel in the dtype of q; log-sum-exp, delta and gradients in fp32, but for the kinds `rounded`.
    """
    (q0, q1), (k0, k1) = split.q[heads], split.kv[heads]
    batch, size, wide = shape.batch, shape.head_dim, accumulation_dtype(shape.dtype)
    gradient = shape.dtype if kind in rounded else wide
    slots, kv_size = shape.kv_size
    parts = {
        "kv": (Part((batch, slots, k1 - k0, kv_size), shape.dtype),),
        "out": (Part((batch, q1 - q0, size), shape.dtype), Part((batch, q1 - q0), wide)),
        "dq": (Part((batch, q1 - q0, size), gradient),),
        "dkv": (Part((batch, slots, k1 - k0, kv_size), gradient),),
        "q": (Part((batch, q1 - q0, size), shape.dtype),)
        if direction == "forward"
        else (Part((batch, 2, q1 - q0, size), shape.dtype), Part((batch, 2, q1 - q0), wide)),
    }
    return parts[kind]


def item_bytes(kind: str, terms: Terms, shape: AttentionShape, heads: int, chunk_length: int) -> int:
    """Bytes of one item of a schedule."""
    parts = payload(kind, terms.direction, shape, shape.split(terms.slices), heads, terms.rounded)
    return chunk_length * sum(part.bytes_per_token for part in parts)


def sent_bytes(schedule: Schedule, rank: int, shape: AttentionShape, chunk_length: int) -> dict[str, int]:
    """Bytes that `rank` hands to the process group, by kind; equal to what RankGroup counts at run time."""
    total: dict[str, int] = {}
    for (kind, heads), count in schedule.sends(rank).items():
        total[kind] = total.get(kind, 0) + count * item_bytes(kind, schedule, shape, heads, chunk_length)
    return total
