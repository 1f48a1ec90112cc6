"""What the recurrent mixers share: the state of decoding, and where documents start."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain.parallel.sequence import SequenceMeta


class RecurrentState:
    """State after the tokens so far, of fixed size.

    scan: [B, H, P, N] in fp32, None before the first token. tails: the last K - 1 inputs of each convolution, [B, K-1, C].
    """

    def __init__(self) -> None:
        self.scan: Tensor | None = None
        self.tails: list[Tensor] | None = None

    def extend(self, inputs: list[Tensor], width: int) -> list[Tensor]:
        """The `width` tokens before the newest inputs [B, S, C], zeros where there were none; remembers the last of these."""
        tails = self.tails or [x.new_zeros(x.shape[0], width, x.shape[2]) for x in inputs]
        self.tails = [torch.cat([tail, x], dim=1)[:, x.shape[1] :] for tail, x in zip(tails, inputs, strict=True)]
        return tails


def document_starts(seq: SequenceMeta) -> Tensor:
    """bool [B, T], True at the first token of every document."""
    return seq.once("document starts", lambda: seq.positions == 0)


def scan_flops(tokens: int, heads: int, size: int, groups: int, state: int, chunk: int) -> int:
    """Multiply-adds x 2 of a forward scan over one row of `tokens`, as its matrix products count them."""
    total = 0
    for q, chunks in ((chunk, tokens // chunk), (tokens % chunk, 1)):
        scores, mixing, states = q * q * groups * state, q * q * heads * size, 2 * q * heads * size * state
        total += 2 * chunks * (scores + mixing + states)
    return total
