"""What the data pipeline hands to the loop: packed samples, and a rank's share of them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.plan import AttentionPlan


class DocumentSpan(NamedTuple):
    """A piece of a document inside a sample: which corpus, which document, from which of its tokens on."""

    corpus: int
    document: int
    offset: int


@dataclasses.dataclass(frozen=True)
class PackedSample:
    """One training sequence of several documents, before any sharding.

    tokens: int64 [seq_len]; positions from borders[-1] on are padding.
    borders: 0 = c0 < c1 < ... < cn <= seq_len; span i covers tokens c(i) .. c(i+1)-1.
    next_token: the token that continues the last document in the following sample, None where the document ends here.
    spans: where each of the n pieces comes from.
    """

    index: int
    tokens: np.ndarray
    borders: tuple[int, ...]
    next_token: int | None
    spans: tuple[DocumentSpan, ...]


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank.

    tokens, labels, positions: int64 [B, layout.local_length], this rank's shard (positions restart in every document).
    borders: per row, the global document borders (see PackedSample).
    targets: valid labels in the whole rows, over all context-parallel ranks.
    plans: this rank's plans for attention over these documents, ready for layers to find (see lctrain.attention_plans); without
        them layers make their own.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    borders: tuple[tuple[int, ...], ...]
    layout: SequenceLayout
    targets: int
    samples: tuple[int, ...]
    spans: tuple[tuple[DocumentSpan, ...], ...]
    plans: tuple[AttentionPlan, ...] = ()

    @property
    def tasks(self) -> tuple[tuple[int, ...], ...]:
        """Per row and document, the place of its corpus in data.corpora: what a task-conditioned layer goes by."""
        return tuple(tuple(span.corpus for span in row) for row in self.spans)


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """All that one rank needs for one optimizer step.

    consumed: samples that the run has used before this step.
    digest: 62-bit sum of hashes of the numbers and tokens of this data-parallel rank's samples, equal on all its
        context-parallel ranks; the sum over data-parallel ranks is the same for every layout.
    """

    step: int
    consumed: int
    micro_batches: tuple[MicroBatch, ...]
    digest: int
