"""Tokens: which of a shard's positions hold real tokens, of which documents, and how many the whole micro-batch has."""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.parallel.sequence import SequenceMeta


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The real tokens of one rank's shard [B, T], flattened; padding is left out of everything that follows.

    real: int64 [n], their places in the flattened shard, or None if no position is padding.
    rows, positions: int64 [n], batch row and position in the whole sequence.
    documents: int64 [n], number of the packed document, counted through the whole micro-batch.
    tasks: int64 [n], which gate a task-conditioned router uses: the corpus of the token's document.
    samples: int64 [n], number of the token's sample in the run.
    lengths: int64 [documents], tokens of every document of the micro-batch, on all ranks of the sequence together.
    """

    real: Tensor | None
    rows: Tensor
    positions: Tensor
    documents: Tensor
    tasks: Tensor
    samples: Tensor
    lengths: Tensor

    @property
    def total(self) -> int:
        """Real tokens of the micro-batch, on all ranks of the sequence together."""
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> Tokens:
        """The same on a device; `lengths` stays where it can be read at no cost."""
        return Tokens(
            None if self.real is None else self.real.to(device),
            self.rows.to(device),
            self.positions.to(device),
            self.documents.to(device),
            self.tasks.to(device),
            self.samples.to(device),
            self.lengths,
        )


def local_tokens(seq: SequenceMeta, length: int, part: int, device: torch.device) -> Tokens:
    """Tokens of this rank's shard.

    Args:
        length: tokens of the shard as it reaches the layer: layout.local_length, or where tensor-parallel ranks divide the
            shard among them, the length of each part (the last may end in padding). part: which of these parts.
    """
    return seq.once(("tokens", length, part, device), lambda: shard_tokens(seq, length, part).to(device))


def shard_tokens(seq: SequenceMeta, length: int, part: int) -> Tokens:
    """See local_tokens; on the CPU, found anew."""
    at = seq.layout.indices(seq.group.rank)[part * length : (part + 1) * length]
    at = F.pad(at, (0, length - len(at)), value=seq.layout.padded_length)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    lengths: list[int] = []
    for row, borders in enumerate(seq.documents):
        local = (at < borders[-1]).nonzero().flatten()
        positions = at[local]
        piece = torch.searchsorted(torch.tensor(borders), positions, right=True) - 1
        tasks = seq.tasks[row] if seq.tasks is not None else (0,) * (len(borders) - 1)
        assert len(tasks) == len(borders) - 1, (tasks, borders)
        sample = seq.samples[row] if seq.samples is not None else row
        found.append(
            (
                local + row * length,
                torch.full_like(local, row),
                positions,
                piece + len(lengths),
                torch.tensor(tasks, dtype=torch.int64)[piece],
                torch.full_like(local, sample),
            )
        )
        lengths += [end - start for start, end in itertools.pairwise(borders)]
    real, in_row, at_position, in_document, of_task, of_sample = (torch.cat(parts) for parts in zip(*found, strict=True))
    whole = len(real) == length * len(seq.documents)
    totals = torch.tensor(lengths, dtype=torch.int64)
    return Tokens(None if whole else real, in_row, at_position, in_document, of_task, of_sample, totals)
