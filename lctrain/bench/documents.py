"""Borders of the packed documents that a benchmark asks for."""

from __future__ import annotations

import itertools

import torch

from lctrain.config.bench import BenchConfig


def document_borders(config: BenchConfig, seq: int) -> tuple[int, ...]:
    """0 = c0 < c1 < ... < cn = seq for the documents of one sequence; the same for every row of the batch."""
    if len(config.documents) > 1:
        return (0, *itertools.accumulate(config.documents))
    generator = torch.Generator().manual_seed(config.seed)
    cuts = torch.randperm(seq - 1, generator=generator)[: config.documents[0] - 1] + 1
    return (0, *sorted(cuts.tolist()), seq)
