"""Capacity: the choices that an expert has no room for, the same for every layout.

Room is given per document and in the order of positions, so what happens to a token depends on earlier tokens of its own
document and on that document's length, on nothing else. Ranks of a sequence gather each other's choices to know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain.models.moe.tokens import Tokens
from lctrain.models.tensor_parallel import shard_length
from lctrain.parallel.group import RankGroup
from lctrain.parallel.sequence import SequenceMeta


def within_capacity(experts: Tensor, tokens: Tokens, seq: SequenceMeta, tp: RankGroup, factor: float, n_experts: int) -> Tensor:
    """Bool [n, k]: whether each choice is among its expert's first ceil(factor * k * document length / n_experts).

    Args:
        experts: int64 [n, k]. tp: ranks that divide the shard among them. Collective over seq.group and tp.
    """
    rows, k = len(seq.documents), experts.shape[1]
    width = shard_length(seq.layout.local_length, tp.size)
    shard = torch.full((rows * width, k), -1, dtype=torch.int32, device=experts.device)
    places = torch.arange(len(shard), device=shard.device) if tokens.real is None else tokens.real
    shard[places] = experts.to(torch.int32)
    parts = tp.all_gather("choices", shard.view(rows, width, k)).movedim(0, 1).flatten(1, 2)
    shards = seq.group.all_gather("choices", parts[:, : seq.layout.local_length])
    whole = seq.layout.unshard(list(shards), dim=1)  # [rows, length, k] in the order of positions

    borders = [torch.tensor(row) for row in seq.documents]
    numbers, first = [], 0
    for row in borders:
        numbers.append(torch.searchsorted(row, torch.arange(seq.layout.length), right=True) - 1 + first)
        first += len(row) - 1
    document = torch.stack(numbers).to(experts.device)
    keys = (document[..., None] * n_experts + whole).flatten()
    live = (whole >= 0).flatten()
    keys = keys.masked_fill(~live, first * n_experts)
    ordered, slots = torch.sort(keys, stable=True)
    starts = torch.searchsorted(ordered, ordered)  # of each run of equal keys
    turn = torch.empty_like(slots)
    turn[slots] = torch.arange(len(slots), device=slots.device) - starts
    turn = turn.view_as(whole)[tokens.rows, tokens.positions]
    room = torch.ceil(factor * k * tokens.lengths.double() / n_experts).long().to(experts.device)
    return turn < room[tokens.documents, None]
