"""Halo: the few tokens before each run of consecutive tokens that a rank owns, fetched from whoever owns them.

A causal convolution over K tokens needs K - 1 of them. Which they are follows from the layout alone, so ranks agree without a
word, and a run shorter than the halo is nothing special: the tokens then come from several runs or ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout

Transfer = tuple[tuple[int, ...], tuple[int, ...]]
"""Local indices of tokens at their owner, and their places among the halos of the receiver (run * width + place)."""


def fetch_halos(tensors: Sequence[Tensor], layout: SequenceLayout, group: RankGroup, width: int) -> tuple[Tensor, ...]:
    """The `width` tokens before each of this rank's runs, in order of position, zeros before the sequence's first.

    All tensors travel in one message per pair of ranks; gradients return to the tokens' owners. Collective over the group.
    Bytes are counted as "halo" and, in backward, "halo gradient"; they do not depend on the sequence's length.

    Args:
        tensors: this rank's tokens, each [B, local_length, C] with a C of its own, all of one dtype.

    Returns:
        For each tensor [B, layout.chunks, width, C].
    """
    return _Halos.apply(layout, group, width, *tensors)


@lru_cache(maxsize=256)
def transfers(layout: SequenceLayout, width: int) -> dict[tuple[int, int], Transfer]:
    """(owner, receiver) -> what travels between them, or stays where both are the same."""
    blocks = sorted((run.start, rank, run.local) for rank in range(layout.world_size) for run in layout.segments(rank))
    size = layout.chunk_length
    found: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for receiver in range(layout.world_size):
        for place, run in enumerate(layout.segments(receiver)):
            assert run.step == 1, layout
            for back in range(1, min(width, run.start) + 1):
                start, owner, local = blocks[(run.start - back) // size]
                at, slots = found.setdefault((owner, receiver), ([], []))
                at.append(local + run.start - back - start)
                slots.append(place * width + width - back)
    return {pair: (tuple(at), tuple(slots)) for pair, (at, slots) in found.items()}


class _Halos(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layout, group, width, *tensors):
        ctx.plan, ctx.group, ctx.shapes = transfers(layout, width), group, [x.shape for x in tensors]
        slots = layout.chunks * width
        halos = [x.new_zeros(x.shape[0], slots, x.shape[2]) for x in tensors]
        _swap(group, "halo", tensors, halos, *_indices(ctx.plan, group.rank, tensors[0].device))
        return tuple(halo.unflatten(1, (layout.chunks, width)) for halo in halos)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dhalos):
        dtensors = [dhalo.new_zeros(shape) for dhalo, shape in zip(dhalos, ctx.shapes, strict=True)]
        sources, targets = _indices(ctx.plan, ctx.group.rank, dhalos[0].device)
        _swap(ctx.group, "halo gradient", [dhalo.flatten(1, 2) for dhalo in dhalos], dtensors, targets, sources)
        return None, None, None, *dtensors


def _indices(
    plan: dict[tuple[int, int], Transfer], rank: int, device: torch.device
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By receiver: local indices of the tokens that `rank` gives; by owner: places in its halos of what it gets."""
    sources = {receiver: torch.tensor(at, device=device) for (owner, receiver), (at, _) in plan.items() if owner == rank}
    targets = {owner: torch.tensor(slots, device=device) for (owner, receiver), (_, slots) in plan.items() if receiver == rank}
    return sources, targets


def _swap(
    group: RankGroup,
    kind: str,
    tensors: Sequence[Tensor],
    into: Sequence[Tensor],
    give: dict[int, Tensor],
    take: dict[int, Tensor],
) -> None:
    """tensors[:, give[peer]] goes to each peer, and is added to into[:, take[me]] there, peers in the order of ranks."""
    channels = [x.shape[2] for x in tensors]
    outgoing = {peer: torch.cat([x.index_select(1, at) for x in tensors], dim=2) for peer, at in give.items()}
    sample = tensors[0]
    incoming = {peer: sample.new_empty(sample.shape[0], len(at), sum(channels)) for peer, at in take.items()}
    if group.rank in outgoing:
        incoming[group.rank] = outgoing[group.rank]
    others = [peer for peer in range(group.size) if peer != group.rank]
    sends = [(kind, outgoing[peer], peer) for peer in others if peer in outgoing]
    group.wait(group.exchange(sends, [(incoming[peer], peer) for peer in others if peer in incoming]))
    for peer in sorted(incoming):
        for x, part in zip(into, incoming[peer].split(channels, dim=2), strict=True):
            x.index_add_(1, take[peer], part)
