"""SequenceLayout: which tokens of a sequence each context-parallel rank owns, in which order.

It alone knows about padding, positions, the label shift, valid targets, sharding and unsharding. Everything that needs one
of these asks it, so that no other file can get a shard border wrong.

Layouts (W ranks, T tokens after padding):
  contiguous  rank r owns block r of W
  zigzag      rank r owns blocks r and 2W-1-r of 2W: equal causal work for every rank
  striped     rank r owns tokens r, r+W, r+2W, ...: equal causal work too (Brandon et al. 2023, Striped Attention)
  balanced    rank r owns those of the equal blocks that `owners` gives it: equal work for packed documents, see
              lctrain.parallel.deal
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that has no target."""

KINDS = ("contiguous", "zigzag", "striped")
"""Layouts that follow from the world size and the length alone; "balanced" needs `owners` too."""


class Segment(NamedTuple):
    """An arithmetic run of global positions start, start+step, ... that lies at local indices [local, local+tokens)."""

    start: int
    step: int
    tokens: int
    local: int


@dataclasses.dataclass(frozen=True)
class SequenceLayout:
    """Ownership of a sequence of `length` tokens by `world_size` ranks.

    Every rank owns `local_length` tokens; the sequence is padded at its end to make this so. Padding belongs to no document:
    nothing attends to it, it attends to nothing, and its label is IGNORE.

    owners: for kind "balanced", the rank of every block in order of position, equally many blocks for each; else None.
    """

    kind: str
    world_size: int
    length: int
    owners: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, "balanced"):
            raise ValueError(f"unknown sequence layout {self.kind!r}: choose one of {', '.join(KINDS)}, balanced")
        if self.world_size < 1 or self.length < 1:
            raise ValueError(
                f"a sequence layout needs world_size >= 1 and length >= 1, got {self.world_size} and {self.length}"
            )
        if (self.kind == "balanced") != (self.owners is not None):
            raise ValueError(
                f"layout {self.kind!r} {'needs' if self.owners is None else 'takes no'} owners of blocks;"
                " lctrain.parallel.deal.make_layout makes a layout of any kind"
            )
        if self.owners is not None:
            dealt = Counter(self.owners)
            if dealt.keys() != set(range(self.world_size)) or len(set(dealt.values())) != 1:
                raise ValueError(
                    f"each of ranks 0 to {self.world_size - 1} needs equally many blocks, got {dict(sorted(dealt.items()))}"
                )

    @property
    def chunks(self) -> int:
        """Segments that each rank owns."""
        if self.owners is not None:
            return len(self.owners) // self.world_size
        return 2 if self.kind == "zigzag" and self.world_size > 1 else 1

    @property
    def padded_length(self) -> int:
        """Tokens after padding: the next multiple of world_size * chunks."""
        blocks = self.world_size * self.chunks
        return -(-self.length // blocks) * blocks

    @property
    def local_length(self) -> int:
        """Tokens that each rank owns, padding included."""
        return self.padded_length // self.world_size

    @property
    def chunk_length(self) -> int:
        """Tokens in each segment."""
        return self.local_length // self.chunks

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """What `rank` owns, in local order."""
        size = self.chunk_length
        if self.kind == "striped":
            return (Segment(rank, self.world_size, size, 0),)
        if self.owners is not None:
            return self._dealt[rank]
        if self.chunks == 1:
            return (Segment(rank * size, 1, size, 0),)
        return (Segment(rank * size, 1, size, 0), Segment((2 * self.world_size - 1 - rank) * size, 1, size, size))

    @cached_property
    def _dealt(self) -> tuple[tuple[Segment, ...], ...]:
        """Segments of every rank from `owners`; masks ask for them often."""
        assert self.owners is not None
        size, dealt = self.chunk_length, [list[Segment]() for _ in range(self.world_size)]
        for block, rank in enumerate(self.owners):
            dealt[rank].append(Segment(block * size, 1, size, len(dealt[rank]) * size))
        return tuple(map(tuple, dealt))

    def indices(self, rank: int) -> Tensor:
        """Global position of every local token of `rank`: int64 [local_length]; positions >= length are padding."""
        return torch.cat([torch.arange(s.start, s.start + s.step * s.tokens, s.step) for s in self.segments(rank)])

    def pad(self, x: Tensor, dim: int, value: float | int) -> Tensor:
        """Append `value` along `dim` up to padded_length."""
        missing = self.padded_length - self._expect(x, dim, self.length)
        if not missing:
            return x
        shape = list(x.shape)
        shape[dim] = missing
        return torch.cat([x, x.new_full(shape, value)], dim=dim)

    def shard(self, x: Tensor, rank: int, dim: int, pad: float | int = 0) -> Tensor:
        """The tokens of `rank` out of a global tensor with `length` entries along `dim`; padding gets the value `pad`."""
        return self.pad(x, dim, pad).index_select(dim, self.indices(rank).to(x.device))

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The global tensor of `length` entries along `dim` from all ranks' shards (in rank order); inverse of shard."""
        if len(shards) != self.world_size:
            raise ValueError(f"unshard needs {self.world_size} shards, got {len(shards)}")
        for shard in shards:
            self._expect(shard, dim, self.local_length)
        order = torch.cat([self.indices(rank) for rank in range(self.world_size)])
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        whole = torch.cat(list(shards), dim=dim)
        return whole.index_select(dim, inverse[: self.length].to(whole.device))

    def moves_to(self, other: SequenceLayout, source: int, target: int) -> tuple[Tensor, Tensor]:
        """Tokens that `source` (in this layout) hands to `target` (in `other`): local indices there and here, both int64.

        Both layouts must describe the same sequence over the same ranks. Padding does not move: it is made anew.
        """
        if (self.length, self.world_size) != (other.length, other.world_size):
            raise ValueError(f"cannot convert {self} to {other}: length and world_size must agree")
        here, there = self.indices(source), other.indices(target)
        local = torch.full((max(self.padded_length, other.padded_length),), -1, dtype=torch.int64)
        local[here] = torch.arange(len(here))
        at = local[there]
        wanted = (at >= 0) & (there < self.length)
        return at[wanted], torch.arange(len(there))[wanted]

    def convert(self, shards: Sequence[Tensor], other: SequenceLayout, dim: int, pad: float | int = 0) -> list[Tensor]:
        """Shards in layout `other` from all ranks' shards in this one (see parallel.exchange for the distributed form)."""
        out = []
        for target in range(other.world_size):
            shape = list(shards[0].shape)
            shape[dim] = other.local_length
            new = shards[0].new_full(shape, pad)
            for source, shard in enumerate(shards):
                at, into = self.moves_to(other, source, target)
                new.index_copy_(dim, into.to(shard.device), shard.index_select(dim, at.to(shard.device)))
            out.append(new)
        return out

    def _expect(self, x: Tensor, dim: int, size: int) -> int:
        if x.shape[dim] != size:
            raise ValueError(f"expected {size} tokens along dimension {dim} for {self}, got a tensor of shape {tuple(x.shape)}")
        return size


def shift_labels(tokens: Tensor, documents: Sequence[Sequence[int]], next_tokens: Sequence[int | None]) -> Tensor:
    """Next-token targets of whole (unsharded) sequences.

    Args:
        tokens: int64 [B, T].
        documents: per row, the document borders 0 = c0 < c1 < ... <= T; tokens from the last border on are padding.
        next_tokens: per row, the token that continues the last document beyond the row, or None where it ends with the row.

    Returns:
        int64 [B, T]: the next token of the same document; IGNORE at every document's last token and on padding.
    """
    labels = torch.full_like(tokens, IGNORE)
    for row, (borders, following) in enumerate(zip(documents, next_tokens, strict=True)):
        end = borders[-1]
        labels[row, : end - 1] = tokens[row, 1:end]
        for border in borders[1:]:
            labels[row, border - 1] = IGNORE
        if following is not None and end > borders[0]:
            labels[row, end - 1] = following
    return labels


def document_positions(documents: Sequence[Sequence[int]], length: int) -> Tensor:
    """Position of each token within its document, int64 [B, length]; padding counts as one more document."""
    positions = torch.empty(len(documents), length, dtype=torch.int64)
    for row, borders in enumerate(documents):
        at = torch.arange(length)
        starts = torch.tensor(list(borders), dtype=torch.int64)
        positions[row] = at - starts[torch.searchsorted(starts, at, right=True) - 1]
    return positions


def count_targets(labels: Tensor) -> int:
    """Number of positions that have a target."""
    return int((labels != IGNORE).sum())
