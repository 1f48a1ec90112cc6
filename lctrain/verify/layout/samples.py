"""Packed samples made of nothing, for proofs: documents of many lengths whose tokens can be learned a little."""

from __future__ import annotations

import itertools

import numpy as np

from lctrain.data.batch import DocumentSpan, PackedSample


class MadeSamples:
    """Sample i is a pure function of (seed, i): several documents, one-token ones and padding among them.

    Within a document tokens count up in steps of its own, with mistakes. Every kind of row comes round: many documents, one
    that fills the row, one that goes on in the next row, a row that is nearly all padding.

    changed: (sample, document) whose tokens are others than usual, to see which losses that changes.
    """

    pad_id = 0

    def __init__(self, seed: int, length: int, vocab_size: int, changed: tuple[int, int] | None = None) -> None:
        self._seed, self._length, self._vocab, self._changed = seed, length, vocab_size, changed

    def borders(self, index: int) -> tuple[int, ...]:
        """Document borders of a sample."""
        length, random = self._length, self._random(index, 0)
        kind = index % 4
        if kind == 0 or length < 4:
            return (0, length)
        if kind == 1:
            cuts = sorted(set(random.integers(1, length, 4).tolist()))
            return (0, *cuts, length)
        if kind == 2:
            middle = int(random.integers(1, length - 1))
            return (0, middle, middle + 1, length)
        return (0, max(1, length // 5), max(2, length // 2))

    def sample(self, index: int) -> PackedSample:
        """See PackedSample."""
        borders, tokens = self.borders(index), np.zeros(self._length, dtype=np.int64)
        for document, (start, end) in enumerate(itertools.pairwise(borders)):
            changed = (index, document) == self._changed
            random = self._random(index, 1 + document + (1000 if changed else 0))
            first, stride = random.integers(1, self._vocab, 2)
            tokens[start:end] = (first + (1 + stride % 3) * np.arange(end - start)) % self._vocab
            mistakes = random.random(end - start) < 0.1
            tokens[start:end][mistakes] = random.integers(0, self._vocab, int(mistakes.sum()))
        spans = tuple(DocumentSpan(0, 1000 * index + document, 0) for document in range(len(borders) - 1))
        next_token = 1 if index % 4 == 1 else None
        return PackedSample(index, tokens, borders, next_token, spans)

    def _random(self, index: int, part: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, index, part))
