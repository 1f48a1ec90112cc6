"""Logits of both sides of a conversion on the same random tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lctrain.config.model import ModelConfig
from lctrain.convert.stream import Source
from lctrain.models.model import LanguageModel
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions
from lctrain.parallel.sequence import SequenceMeta

BAR, ROUNDED_BAR = 1e-3, 0.3
"""Largest error per token, of the largest logit: with the same numbers in both, and where the output's were rounded."""
FLIPPED = 0.05
"""Share of tokens of a mixture of experts that may lie beyond: rounding sends a token with two equal experts to either."""


class Comparison(NamedTuple):
    """worst: largest difference over the largest logit. beyond: share of the tokens whose own lies beyond `bar`."""

    worst: float
    beyond: float
    bar: float
    passed: bool


def random_tokens(count: int, vocabulary: int) -> Tensor:
    """int64 [count], the same ones every time."""
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def our_logits(config: ModelConfig, source: Source, tokens: Tensor) -> Tensor:
    """fp32 [T, vocabulary] of one document, int64 tokens [T], on one process."""
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        tensor.copy_(source.read(name))
    length = len(tokens)
    documents = ((0, length),)
    seq = SequenceMeta(SequenceLayout("contiguous", 1, length), RankGroup(), document_positions(documents, length), documents)
    hidden = model.eval().hidden(tokens[None], seq)
    return hidden[0].float() @ model.output_weight.float().t()


def compare(found: Tensor, wanted: Tensor, rounded: bool, experts: bool) -> Comparison:
    """Of logits [T, V] and [T, V']; more columns than the other has are padding."""
    width = min(found.shape[1], wanted.shape[1])
    found, wanted = found[:, :width], wanted[:, :width]
    per_token = (found - wanted).abs().amax(1) / wanted.abs().max().clamp(min=1e-30)
    bar = ROUNDED_BAR if rounded else BAR
    beyond = float((~(per_token <= bar)).float().mean())
    return Comparison(float(per_token.max()), beyond, bar, beyond <= (FLIPPED if experts else 0.0))
