"""Merging stretches of a linear recurrence: the associative combine of a scan.

What a stretch of tokens does to the state before it is `state -> decay * state + added`, so (decay, added) sums it up, and two
stretches in a row sum up to
    (decay, added)'' = (decay' * decay,  decay' * added + added')
This is one idea with lctrain.kernels.attention.merge, where (lse, out) sums up a set of keys: a stretch of the sequence is
computed by itself, wherever it lies, and small summaries combine in any grouping to exactly what one pass over everything
gives. Attention's combine also commutes, so its partial results may arrive in any order; a recurrence's must keep theirs.
The empty stretch is (1, 0), as (-inf, 0) is the empty set of keys. A document's start within a stretch makes its decay 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Summary(NamedTuple):
    """decay [..., H]: what remains of the state before the stretch; added [..., H, P, N]: what the stretch itself leaves."""

    decay: Tensor
    added: Tensor


def merge(first: Summary, second: Summary) -> Summary:
    """The summary of two stretches in a row."""
    return Summary(second.decay * first.decay, torch.addcmul(second.added, second.decay[..., None, None], first.added))


def exclusive(summaries: Iterable[Summary]) -> Iterator[Tensor]:
    """For each stretch, in order: the state that reaches it if nothing comes before the first one."""
    before: Summary | None = None
    for summary in summaries:
        yield torch.zeros_like(summary.added) if before is None else before.added
        before = summary if before is None else merge(before, summary)
