"""Comparing the copies of the weights that data-parallel ranks hold: a bit that flipped in one of them is found and placed.

All copies see the same gradients and take the same updates, so they are equal to the last bit. One that is not means a broken
memory, device or link: training on would spread the damage through the next gradient reduction, silently.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lctrain.checkpoint.agree import gather
from lctrain.checkpoint.state import State, tensors_of
from lctrain.errors import UserError
from lctrain.tracking.tracker import Tracker

WORDS_AT_ONCE = 1 << 22

Part = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name of a tensor, the shape of a rank's share, and where it begins in the whole."""


def different_replicas(weights: State) -> tuple[int, list[str]]:
    """How many shares of tensors have more than one copy, and one line per copy that differs from most of the others.

    weights: as in engine.state()["model"]. Collective over all ranks; equal on all of them.
    """
    mine = {_part(name, tensor): fingerprint(_local(tensor)) for name, tensor in tensors_of(weights).items()}
    copies: dict[Part, list[tuple[int, int]]] = defaultdict(list)
    for rank, parts in enumerate(gather(mine)):
        for part, value in parts.items():
            copies[part].append((rank, value))
    compared, names_of = 0, defaultdict(list)
    for part, values in copies.items():
        compared += len(values) > 1
        votes = Counter(value for _, value in values).most_common()
        if len(votes) > 1:
            tied = votes[0][1] == votes[1][1]
            odd = tuple(rank for rank, value in values if tied or value != votes[0][0])
            names_of[odd, tied].append(part[0])
    return compared, [_line(ranks, tied, names) for (ranks, tied), names in names_of.items()]


def fingerprint(tensor: Tensor) -> int:
    """64 bits over the bytes of a tensor, in order: any one changed bit changes them. Computed where the tensor is."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if rest := -data.numel() % 4:
        data = torch.cat([data, data.new_zeros(rest)])
    words = data.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for begin in range(0, words.numel(), WORDS_AT_ONCE):
        piece = words[begin : begin + WORDS_AT_ONCE].to(torch.int64)
        odd = torch.arange(begin, begin + piece.numel(), device=words.device) * 0x2545F4914F6CDD1D * 2 + 1
        total += (piece * odd).sum()  # odd factors: no difference of words is lost modulo 2**64
    return int(total)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(name: str, tensor: Any) -> Part:
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return name, tuple(shape), tuple(offset)
    return name, tuple(tensor.shape), (0,) * tensor.dim()


def _line(ranks: tuple[int, ...], tied: bool, names: list[str]) -> str:
    named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    who = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
    return (
        f"{who} {'differ from each other' if tied else 'differs from the others' if len(ranks) == 1 else 'differ'} in {named}"
    )


def check_replicas(weights: State, step: int, first: bool, tracker: Tracker) -> None:
    """UserError on every rank, and an event, if copies of the weights differ after `step` finished steps. Collective."""
    compared, lines = different_replicas(weights)
    if first and not compared:
        tracker.message("warning: trainer.replica_check_every compares nothing: no rank holds a copy of another's weights")
    if lines:
        tracker.event("replicas_differ", step=step, differences=lines)
        raise UserError(
            f"step {step}: copies of the weights differ: {'; '.join(lines)}: memory, a device or a link is broken there;"
            " continue without that machine, from the newest checkpoint of before"
        )
