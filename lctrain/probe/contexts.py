"""Held-out texts in which a passage comes twice: where it is planted, and again at the end.

A text of one length is a document of its own, so that several short ones share a row, and no text sees another.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from lctrain.config.probe import ProbeConfig
from lctrain.data.batch import DocumentSpan, PackedSample
from lctrain.data.samples import SampleSource
from lctrain.errors import UserError

UNSCORED = -1
MOST_SAMPLES = 100
"""Without a token in them, of documents that are not empty."""


class Text(NamedTuple):
    """One text. depth: number of the place where the passage is planted; None for the text without it."""

    passage: int
    length: int
    depth: int | None


class ProbeTexts:
    """The rows of a probe as samples 0, 1, 2, ...: a pure function of the held-out documents and the config.

    rows: that hold texts; later samples are padding.
    cells: losses are added up by length and depth, the text without the passage last: [len(lengths), depths + 1].
    """

    def __init__(self, config: ProbeConfig, seq_len: int, source: SampleSource) -> None:
        self.config, self.pad_id = config, source.pad_id
        self.lengths = config.context_lengths(seq_len)
        self.cells = (len(self.lengths), config.depths + 1)
        self._seq_len, self._source = seq_len, source
        depths = [*range(config.depths), None]
        self._rows: list[list[Text]] = []
        for length in self.lengths:
            texts = [Text(passage, length, depth) for passage in range(config.passages) for depth in depths]
            at_once = seq_len // length
            self._rows += [texts[first : first + at_once] for first in range(0, len(texts), at_once)]
        self._passages = [self._passage(number) for number in range(config.passages)]
        self._corpora = [source.sample(number).spans[0].corpus for number in range(config.passages)]

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def scored(self) -> int:
        """Tokens of a passage whose loss counts."""
        return self.config.passage - self.config.passage // 3

    def sample(self, index: int) -> PackedSample:
        """See Samples."""
        texts = self._rows[index] if index < self.rows else []
        tokens = np.full(self._seq_len, self.pad_id, np.int64)
        borders = [0, *itertools.accumulate(text.length for text in texts)] if texts else [0, 1]
        for text, start in zip(texts, borders, strict=False):
            tokens[start : start + text.length] = self._tokens(text)
        corpora = [self._corpora[text.passage] for text in texts] or [0]
        spans = tuple(DocumentSpan(corpus, number, 0) for number, corpus in enumerate(corpora))
        return PackedSample(index, tokens, tuple(borders), None, spans)

    def cells_of(self, index: int) -> np.ndarray:
        """For every token of a row the cell, counted along `cells`, of which the loss of its prediction is part, or UNSCORED;
        int64 [seq_len]."""
        found, start = np.full(self._seq_len, UNSCORED, np.int64), 0
        for text in self._rows[index] if index < self.rows else []:
            end = start + text.length
            depth = self.config.depths if text.depth is None else text.depth
            found[end - self.scored - 1 : end - 1] = self.lengths.index(text.length) * self.cells[1] + depth
            start = end
        return found

    def _tokens(self, text: Text) -> np.ndarray:
        passage = self._passages[text.passage]
        around = text.length - len(passage)
        if text.depth is None:
            return np.concatenate([self._haystack(text.passage, around), passage])
        around -= len(passage)
        before = round(around * text.depth / (self.config.depths - 1))
        haystack = self._haystack(text.passage, around)
        return np.concatenate([haystack[:before], passage, haystack[before:], passage])

    def _passage(self, number: int) -> np.ndarray:
        """Text from inside a sample: documents often begin alike."""
        skipped = self._seq_len // 3
        return self._text(number, skipped + self.config.passage)[skipped:]

    def _haystack(self, number: int, length: int) -> np.ndarray:
        """Text of other samples. Few held-out documents come round again and again: the passage itself is cut out of them."""
        passage = self._passages[number]
        for times in (1, 2, 4, 8):
            text = without(self._text(self.config.passages + number, times * (length + len(passage))), passage)
            if len(text) >= length:
                return text[:length]
        raise UserError("the held-out documents are one passage over and over: set probe.every=0, or hold out other documents")

    def _text(self, first: int, length: int) -> np.ndarray:
        """Tokens of held-out samples from one on, without ends of documents; int64 [length]."""
        parts, missing = [], length
        for number in itertools.count(first):
            sample = self._source.sample(number)
            tokens = sample.tokens[: sample.borders[-1]]
            tokens = tokens[tokens != self.pad_id][:missing]
            parts.append(tokens)
            missing -= len(tokens)
            if not missing:
                return np.concatenate(parts)
            if number - first > MOST_SAMPLES and missing == length:
                raise UserError("the held-out documents are empty: set probe.every=0, or hold out other documents")
        raise AssertionError("unreachable: count has no end")


def without(tokens: np.ndarray, passage: np.ndarray) -> np.ndarray:
    """Tokens [n] with every occurrence of `passage` [m] cut out, also those that a cut makes."""
    size = len(passage)
    while len(tokens) >= size:
        windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
        kept, end = np.ones(len(tokens), bool), 0
        for place in np.flatnonzero((windows == passage).all(axis=1)).tolist():
            if place >= end:
                end = place + size
                kept[place:end] = False
        if not end:
            break
        tokens = tokens[kept]
    return tokens
