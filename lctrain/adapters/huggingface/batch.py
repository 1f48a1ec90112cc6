"""From a whole batch to one rank's share of it, as keyword arguments for a transformers model."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.parallel.deal import make_layout
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import IGNORE, count_targets, document_positions, shift_labels
from lctrain.parallel.mask import Borders
from lctrain.parallel.sequence import SequenceMeta
from lctrain.parallel.strategy import Strategy


def shard_batch(
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    group: RankGroup,
    documents: Sequence[Sequence[int]] | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    layout: str = "zigzag",
    strategy: str | Strategy = "ring",
) -> dict[str, Any]:
    """This rank's share of a batch, for `model(**shard_batch(...))`.

    Every rank of the group gives the same whole batch. Documents packed into a row are told in one of three ways (none of
    them: every row is one document). No token attends to, or predicts, a token of another document.

    Args:
        input_ids: int64 [B, S], any S: it is padded to a length that can be split.
        labels: int64 [B, S] as transformers wants them: not shifted (usually input_ids), -100 where there is no target.
        documents: per row, borders 0 = c0 < c1 < ... <= S; what lies beyond the last one is padding.
        position_ids: int64 [B, S]; a new document begins wherever it does not go up by one.
        cu_seqlens: borders of the one row of the batch, in FlashAttention's form.
        layout: "zigzag" (equal causal work for all ranks), "balanced" (equal work for packed documents too), "contiguous" or
            "striped".
        strategy: how attention moves tensors: "ring", "ulysses", ... or a Strategy with its degrees.

    Returns:
        input_ids, position_ids [B, S / ranks]; use_cache; sequence, for the attention function; with labels also
        labels and shift_labels (the same: already shifted, since a shard's next token may lie on another rank) and
        num_items_in_batch, the targets of the whole batch. The ranks' losses then add up to the mean over all targets, and
        so do their gradients. Over several batches (accumulation, data parallelism) set num_items_in_batch to their total.

    Raises:
        ValueError: arguments that do not fit together, or a batch that differs between ranks.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be [batch, tokens] with at least one token, got {tuple(input_ids.shape)}")
    for name, tensor in (("labels", labels), ("position_ids", position_ids)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape of input_ids {tuple(input_ids.shape)}")
    borders = _borders(input_ids, documents, position_ids, cu_seqlens)
    _check_same(group, input_ids, labels, borders)
    split = make_layout(layout, group.size, input_ids.shape[1], borders)
    positions = document_positions(borders, split.length).to(input_ids.device) if position_ids is None else position_ids
    positions = split.shard(positions, group.rank, 1)
    batch: dict[str, Any] = {
        "input_ids": split.shard(input_ids, group.rank, 1),
        "position_ids": positions,
        "use_cache": False,
        "sequence": SequenceMeta(split, group, positions, borders, strategy),
    }
    if labels is not None:
        targets = shift_labels(labels, borders, [None] * len(borders))
        batch["labels"] = batch["shift_labels"] = split.shard(targets, group.rank, 1, pad=IGNORE)
        batch["num_items_in_batch"] = max(1, count_targets(targets))
    return batch


def _borders(
    input_ids: Tensor,
    documents: Sequence[Sequence[int]] | None,
    position_ids: Tensor | None,
    cu_seqlens: Sequence[int] | Tensor | None,
) -> tuple[Borders, ...]:
    rows, length = input_ids.shape
    given = [
        n for n, x in [("documents", documents), ("position_ids", position_ids), ("cu_seqlens", cu_seqlens)] if x is not None
    ]
    if len(given) > 1:
        raise ValueError(f"give documents in one way, not in several: {' and '.join(given)}")
    if cu_seqlens is not None:
        if rows != 1:
            raise ValueError(f"cu_seqlens describes a batch of one row, this one has {rows}: use documents")
        documents = [cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens]
    if position_ids is not None:
        starts = (position_ids.diff(dim=1) != 1).cpu()
        documents = [[0, *(torch.nonzero(row).flatten() + 1).tolist(), length] for row in starts]
    if documents is None:
        documents = [(0, length)] * rows
    borders = tuple(tuple(int(border) for border in row) for row in documents)
    if len(borders) != rows:
        raise ValueError(f"documents has borders for {len(borders)} rows, the batch has {rows}")
    for row in borders:
        if len(row) < 2 or row[0] != 0 or row[-1] > length or any(a >= b for a, b in itertools.pairwise(row)):
            raise ValueError(f"document borders must rise from 0 to at most {length}, got {row}")
    return borders


def _check_same(group: RankGroup, input_ids: Tensor, labels: Tensor | None, borders: tuple[Borders, ...]) -> None:
    """A sampler that deals different rows to the ranks of a sequence group would train on scrambled text, silently."""
    if group.size == 1:
        return
    digest = hashlib.blake2b(repr((tuple(input_ids.shape), borders)).encode(), digest_size=7)
    for tensor in (input_ids, labels):
        digest.update(b"-" if tensor is None else tensor.cpu().contiguous().numpy().tobytes())
    mine = int.from_bytes(digest.digest(), "big")
    device = "cuda" if dist.get_backend(group.process_group) == "nccl" else "cpu"
    extremes = torch.tensor([mine, -mine], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group.process_group)
    if extremes[0] != -extremes[1]:
        raise ValueError(
            f"the batch of rank {group.rank} differs from another rank's: all {group.size} ranks of a sequence group must"
            " get the same rows; sample by data-parallel rank, not by global rank"
        )
