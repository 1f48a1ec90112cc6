"""Heads for sequence: the all-to-all of Ulysses (Jacobs et al. 2023), for any number of heads and any layout.

U ranks that each hold some tokens of all heads come to hold all their tokens of some heads. Slices may be uneven, and a
key/value head that several slices need is sent to each of them. Queries, keys and values leave together; what comes back is
the output alone. In backward output gradients go out and gradients come back in the tensors' own dtype: each is complete.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lctrain.parallel.group import RankGroup
from lctrain.parallel.heads import HeadSplit
from lctrain.parallel.layout import Segment, SequenceLayout

Slices = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A Placement in which groups of ranks of a layout act as one rank that holds all their tokens, in rising position.

    groups: per group its ranks; all groups have equally many.
    """

    layout: SequenceLayout
    groups: tuple[tuple[int, ...], ...]

    @property
    def world_size(self) -> int:
        """Groups."""
        return len(self.groups)

    @property
    def chunks(self) -> int:
        """Chunks of a group."""
        return self.layout.chunks * len(self.groups[0])

    @property
    def chunk_length(self) -> int:
        """Tokens per chunk."""
        return self.layout.chunk_length

    @property
    def local_length(self) -> int:
        """Tokens of a group."""
        return self.layout.local_length * len(self.groups[0])

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The chunks of a group by rising position."""
        return self._segments[rank]

    def places(self, rank: int) -> dict[tuple[int, int], int]:
        """For every (member, its chunk): the chunk's place within the group."""
        return {(member, part): place for place, (_, member, part) in enumerate(self._ordered(rank))}

    @cached_property
    def _segments(self) -> tuple[tuple[Segment, ...], ...]:
        """Segments of every group; masks ask for them often."""
        size, ranks = self.chunk_length, range(self.world_size)
        return tuple(
            tuple(segment._replace(local=place * size) for place, (segment, _, _) in enumerate(self._ordered(rank)))
            for rank in ranks
        )

    def _ordered(self, rank: int) -> list[tuple[Segment, int, int]]:
        members = enumerate(self.groups[rank])
        return sorted((segment, m, part) for m, r in members for part, segment in enumerate(self.layout.segments(r)))


class HeadExchange:
    """One rank's side of the exchange within its group."""

    def __init__(self, group: RankGroup, grouped: Grouped, index: int, split: HeadSplit) -> None:
        """index: this rank's group in `grouped`; split: one slice of the heads per member."""
        self.group, self.split = group, split
        self.members = grouped.groups[index]
        self.me = self.members.index(group.rank)
        self.places = grouped.places(index)
        self.chunks, self.size = grouped.layout.chunks, grouped.chunk_length

    def to_heads(self, tensors: list[tuple[str, Tensor, Slices]]) -> list[Tensor]:
        """[B, T, heads, D] with all heads of this rank's tokens -> [B, U*T, slice, D], all tokens of this rank's slice."""
        joints = []
        sends: list[tuple[str, Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        for kind, x, slices in tensors:
            joint = self._buffer(x, slices[self.me])
            for member, peer in enumerate(self.members):
                mine = x[:, :, slice(*slices[member])].transpose(0, 1)
                for part in range(self.chunks):
                    chunk = mine[part * self.size : (part + 1) * self.size]
                    if member == self.me:
                        self._place(joint, member, part).copy_(chunk)
                    else:
                        sends.append((kind, chunk.contiguous(), peer))
                        receives.append((self._place(joint, member, part), peer))
            joints.append(joint)
        self._run(sends, receives)
        return [joint.transpose(0, 1) for joint in joints]

    def to_tokens(self, tensors: list[tuple[str, Tensor, Slices]]) -> list[Tensor]:
        """The way back, [B, U*T, slice, D] -> [B, T, heads, D]; what several slices give for one head is added up."""
        arrivals: list[list[tuple[int, int, Tensor]]] = []
        sends: list[tuple[str, Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        for kind, joint, slices in tensors:
            tokens = joint.transpose(0, 1)
            arrived = []
            for member, peer in enumerate(self.members):
                for part in range(self.chunks):
                    chunk = self._place(tokens, member, part)
                    first, end = slices[member]
                    if member == self.me:
                        arrived.append((member, part, self._place(tokens, self.me, part)))
                    else:
                        sends.append((kind, chunk.contiguous(), peer))
                        buffer = chunk.new_empty(self.size, chunk.shape[1], end - first, chunk.shape[3])
                        receives.append((buffer, peer))
                        arrived.append((member, part, buffer))
            arrivals.append(arrived)
        self._run(sends, receives)
        return [self._add_up(slices, arrived) for (_, _, slices), arrived in zip(tensors, arrivals, strict=True)]

    def _add_up(self, slices: Slices, arrived: list[tuple[int, int, Tensor]]) -> Tensor:
        like = arrived[0][2]
        heads = max(end for _, end in slices)
        whole = like.new_zeros(self.chunks * self.size, like.shape[1], heads, like.shape[3])
        for member, part, chunk in arrived:
            whole[part * self.size : (part + 1) * self.size, :, slice(*slices[member])] += chunk
        return whole.transpose(0, 1)

    def _place(self, joint: Tensor, member: int, part: int) -> Tensor:
        place = self.places[member, part]
        return joint[place * self.size : (place + 1) * self.size]

    def _buffer(self, x: Tensor, heads: tuple[int, int]) -> Tensor:
        tokens = len(self.members) * self.chunks * self.size
        return x.new_empty(tokens, x.shape[0], heads[1] - heads[0], x.shape[3])

    def _run(self, sends: list[tuple[str, Tensor, int]], receives: list[tuple[Tensor, int]]) -> None:
        sends = [entry for entry in sends if entry[1].numel()]
        self.group.wait(self.group.exchange(sends, [entry for entry in receives if entry[0].numel()]))


class ToHeads(torch.autograd.Function):
    """q and what stands for keys and values, [B, T, heads, D] -> the same for all tokens of the group and this rank's heads."""

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, q: Tensor, *kv: Tensor) -> tuple[Tensor, ...]:
        """kv: k and v, or one latent of one head. See HeadExchange.to_heads."""
        ctx.exchange = exchange
        split = exchange.split
        return tuple(exchange.to_heads([("q", q, split.q), *(("kv", x, split.kv) for x in kv)]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients home."""
        split = ctx.exchange.split
        dq, *dkv = grads
        return None, *ctx.exchange.to_tokens([("dq", dq, split.q), *(("dkv", x, split.kv) for x in dkv)])


class ToTokens(torch.autograd.Function):
    """out [B, U*T, slice, D] -> [B, T, heads, D], this rank's tokens of all heads."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, exchange: HeadExchange) -> Tensor:
        """See HeadExchange.to_tokens."""
        ctx.exchange = exchange
        return exchange.to_tokens([("out", out, exchange.split.q)])[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Output gradients to the ranks that compute their heads."""
        return ctx.exchange.to_heads([("dout", grads[0], ctx.exchange.split.q)])[0], None
