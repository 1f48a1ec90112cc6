"""What parts of a model cost one rank: arithmetic, memory traffic, what is kept for backward, what is sent. Bytes, FLOPs."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

FP32 = 4
"""Bytes of a weight, a moment, a gradient and a count of steps."""


class Operation(NamedTuple):
    """A kernel that runs `calls` times: multiply-adds x 2 of its matrix products (0 without), bytes that it reads and writes.

    The attention kernel is not among them: its time depends on the mask, which the simulator knows. What a sequence-parallel
    strategy runs around that kernel (packing, merging) has a name that begins with `attention.`.
    """

    name: str
    flops: int
    bytes: int
    calls: int


class Sent(NamedTuple):
    """Bytes that a rank hands over along one dimension of the mesh, by kind of collective, and in how many calls.

    dimension: tp, cp, ep, etp, dp, dp_cp, edp or pp. collective: all_reduce, all_gather, reduce_scatter, all_to_all, exchange
    (messages between two ranks), or attention: what its strategies send, which the simulator prices. bytes: of the whole call
    as this rank sends them over the links in a ring or directly, so that they can be divided by a bandwidth: (n-1)/n of a
    reduced or gathered tensor, twice that for an all_reduce.
    """

    dimension: str
    collective: str
    bytes: int
    calls: int


@dataclasses.dataclass(frozen=True)
class PassCost:
    """One direction of one part, over one micro-batch, on one rank.

    peak: most bytes that it holds at once, beyond its inputs and what is kept, its results included.
    """

    operations: tuple[Operation, ...]
    sent: tuple[Sent, ...]
    peak: int

    @property
    def flops(self) -> int:
        """Of all matrix products but attention's."""
        return sum(operation.flops * operation.calls for operation in self.operations)


@dataclasses.dataclass(frozen=True)
class PartCost:
    """A sublayer, the embedding, or the head with the loss.

    name: the sublayer's symbol in the pattern, "embedding" or "loss".
    kept: bytes that stay for backward when forward is done, weights not counted: with activation checkpointing the input alone.
        What all sublayers share, such as rotary angles, is the embedding's.
    """

    name: str
    forward: PassCost
    backward: PassCost
    kept: int


class StaticMemory(NamedTuple):
    """Bytes that a rank holds whatever it works on, as Engine.memory() counts them."""

    weights: int
    gradients: int
    optimizer: int
