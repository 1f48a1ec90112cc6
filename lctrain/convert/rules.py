"""Rules: how some of our tensors correspond to some of another program's, in both directions.

A family's table is made of these. Each rule only moves numbers (it splits, joins, stacks and reorders), so going there and back
gives every bit again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Shapes = Sequence[torch.Size]


class Operation(Protocol):
    """What lies between the two sides of a rule."""

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        """Their tensors from ours."""
        ...

    def to_ours(self, theirs: list[Tensor], shapes: Shapes) -> list[Tensor]:
        """Our tensors, of these shapes, from theirs."""
        ...


@dataclasses.dataclass(frozen=True)
class Same:
    """The same tensor, but for dimensions of size 1."""

    taps: bool = False
    """Weights of a depthwise convolution: [channels, K] is [channels, 1, K] there."""

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        return [x.unsqueeze(1) if self.taps else x for x in ours]

    def to_ours(self, theirs: list[Tensor], shapes: Shapes) -> list[Tensor]:
        return [x.reshape(shape) for x, shape in zip(theirs, shapes, strict=True)]


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several of ours are one of theirs, row after row."""

    taps: bool = False
    """As for Same."""
    axis: int = 0
    """Dimension along which they are joined: 1 where 0 is the expert."""

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        whole = torch.cat(ours, dim=self.axis)
        return [whole.unsqueeze(1) if self.taps else whole]

    def to_ours(self, theirs: list[Tensor], shapes: Shapes) -> list[Tensor]:
        parts = theirs[0].split([shape[self.axis] for shape in shapes], dim=self.axis)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """One of ours holds all experts; they have each by itself."""

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        return list(ours[0].unbind())

    def to_ours(self, theirs: list[Tensor], shapes: Shapes) -> list[Tensor]:
        return [torch.stack(theirs)]


@dataclasses.dataclass(frozen=True)
class Reordered:
    """Rows of each head stand in another order: theirs[i] is ours[order[i]]."""

    heads: int
    order: tuple[int, ...]

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        return [self._take(ours[0], torch.tensor(self.order))]

    def to_ours(self, theirs: list[Tensor], shapes: Shapes) -> list[Tensor]:
        return [self._take(theirs[0], torch.tensor(self.order).argsort())]

    def _take(self, x: Tensor, order: Tensor) -> Tensor:
        return x.unflatten(0, (self.heads, -1)).index_select(1, order.to(x.device)).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class GroupedHeads:
    """Our q, k and v are one of theirs, in which the query heads of a key head stand before it, and its values after it."""

    kv_heads: int
    order: tuple[int, ...] = ()
    """As for Reordered, of every head of q and k; empty: the same order."""

    def to_theirs(self, ours: list[Tensor]) -> list[Tensor]:
        q, k, v = ours
        parts = [self._take(q, self.order), self._take(k, self.order), v]
        return [torch.cat([x.unflatten(0, (self.kv_heads, -1)) for x in parts], dim=1).flatten(0, 1)]

    def to_ours(self, theirs: list[Tensor], shapes: Shapes) -> list[Tensor]:
        per_group = [shape[0] // self.kv_heads for shape in shapes]
        q, k, v = (part.flatten(0, 1) for part in theirs[0].unflatten(0, (self.kv_heads, -1)).split(per_group, dim=1))
        back = tuple(torch.tensor(self.order).argsort().tolist())
        return [self._take(q, back), self._take(k, back), v]

    @staticmethod
    def _take(x: Tensor, order: tuple[int, ...]) -> Tensor:
        if not order:
            return x
        return x.unflatten(0, (-1, len(order))).index_select(1, torch.tensor(order, device=x.device)).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class Rule:
    """ours, theirs: names, in a table relative to the layer. `{expert}` in one of theirs stands for all experts' names."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    operation: Operation = Same()

    def at(self, our_prefix: str, their_prefix: str, experts: int) -> Rule:
        """The same rule with full names."""
        theirs = []
        for name in self.theirs:
            full = f"{their_prefix}{name}"
            theirs += [full.replace("{expert}", str(e)) for e in range(experts)] if "{expert}" in full else [full]
        return Rule(tuple(f"{our_prefix}{name}" for name in self.ours), tuple(theirs), self.operation)


def same(ours: str, theirs: str) -> Rule:
    """One tensor, another name."""
    return Rule((ours,), (theirs,))


def joined(ours: Sequence[str], theirs: str) -> Rule:
    """See Joined."""
    return Rule(tuple(ours), (theirs,), Joined())


def taps(ours: Sequence[str], theirs: str) -> Rule:
    """Weights of convolutions: see Joined."""
    return Rule(tuple(ours), (theirs,), Joined(taps=True))


def experts(ours: str, theirs: str) -> Rule:
    """See Stacked; theirs has `{expert}`."""
    assert "{expert}" in theirs, theirs
    return Rule((ours,), (theirs,), Stacked())


def partial_rotation(head_dim: int, rotated: int) -> tuple[int, ...]:
    """For Reordered: the first `rotated` entries of a head are rotated, halves against each other, and the rest are not.

    We rotate entry i against i + head_dim / 2 and leave the last pairs alone.
    """
    pairs, half = rotated // 2, head_dim // 2
    rest = [*range(pairs, half), *range(half + pairs, head_dim)]
    return (*range(pairs), *range(half, half + pairs), *rest)


def rotated_pairs(kept: int, rotated: int) -> tuple[int, ...]:
    """For Reordered: after `kept` entries come `rotated` ones, of which neighbours are rotated against each other.

    We rotate halves against each other: the same scores, because queries and keys are reordered alike.
    """
    half = rotated // 2
    return (*range(kept), *(kept + i // 2 + half * (i % 2) for i in range(rotated)))
