"""Peer: another library's sequence-parallel attention, as `lctrain bench attention --peers` sees it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lctrain.bench.attention_problem import Problem
from lctrain.parallel.layout import SequenceLayout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""This rank's q [B, T, H, D] and k, v [B, T, Hkv, D] -> out [B, T, H, D]; causal."""


@dataclass(frozen=True)
class Peer:
    """One way of one library.

    name: as in the table. family: the strategy of ours that moves the same things.
    packages: what must be importable. install: how a user gets that, one line.
    kernel: what computes its blocks here.
    layout: who owns which tokens, from the number of ranks and the length.
    prepare: (rank, world size, problem) -> Attend; collective, imports the library.
    refuses: why a problem cannot be computed on so many ranks, or None.
    backward: whether gradients can be had.
    """

    name: str
    family: str
    packages: tuple[str, ...]
    install: str
    kernel: str
    layout: Callable[[int, int], SequenceLayout]
    prepare: Callable[[int, int, Problem], Attend]
    refuses: Callable[[Problem, int], str | None] = lambda problem, world_size: None
    backward: bool = True

    @property
    def missing(self) -> str | None:
        """The first package that is not installed."""
        return next((name for name in self.packages if importlib.util.find_spec(name) is None), None)


def contiguous(world_size: int, length: int) -> SequenceLayout:
    """Neighbouring tokens."""
    return SequenceLayout("contiguous", world_size, length)


def zigzag(world_size: int, length: int) -> SequenceLayout:
    """The first and the last of what is left: "head-tail" in torch."""
    return SequenceLayout("zigzag", world_size, length)


def uneven(problem: Problem, world_size: int) -> str | None:
    """For libraries that need equal shards of two equal halves."""
    return None if problem.seq % (2 * world_size) == 0 else f"length is not a multiple of {2 * world_size}"
