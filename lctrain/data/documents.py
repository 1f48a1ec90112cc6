"""The documents of one corpus: which are held out, and the endless order in which the others are read."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from lctrain.data.indexed import IndexedDataset
from lctrain.data.shuffle import make_key, permutations, splitmix64

_SMALL = 1 << 16
"""Tokens below which several epochs are laid out together; a sample may span thousands of epochs of a tiny corpus."""


def split_documents(count: int, corpus: int, valid_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and of the held-out documents, both int64 and ascending.

    A document is held out if the hash of (corpus, number) says so: appending documents to a corpus moves no old document
    from one side to the other. If every document of a small corpus falls to evaluation, one is left for training.
    """
    hashes = splitmix64(np.arange(count, dtype=np.uint64) ^ np.uint64(make_key(corpus)))
    held_out = hashes / 2.0**64 < valid_fraction
    if held_out.all() and count:
        held_out[np.argmax(hashes)] = False
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class Pieces(NamedTuple):
    """Consecutive parts of one sample, each a part of one document: int64 [n] each."""

    documents: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray


class Round(NamedTuple):
    """One or more epochs: documents in reading order, int64 [n], and their token borders, int64 [n+1], from 0."""

    documents: np.ndarray
    borders: np.ndarray


class Documents:
    """An endless stream of the given documents: every epoch is a new permutation of all of them.

    Stream positions count tokens from the start of epoch 0. Empty documents are left out.
    """

    def __init__(self, dataset: IndexedDataset, numbers: np.ndarray, key: int) -> None:
        self.dataset = dataset
        self.numbers = numbers[dataset.lengths[numbers] > 0]
        self.lengths = dataset.lengths[self.numbers]
        self.epoch_tokens = int(self.lengths.sum())
        self._key = key
        self._epochs = max(1, -(-_SMALL // max(1, self.epoch_tokens)))
        self._round = functools.lru_cache(maxsize=4)(self._lay_out)

    def __len__(self) -> int:
        return len(self.numbers)

    def pieces(self, start: int, length: int) -> Pieces:
        """What the stream holds at positions [start, start + length)."""
        parts = []
        round_tokens = self.epoch_tokens * self._epochs
        while length:
            number, begin = divmod(start, round_tokens)
            end = min(begin + length, round_tokens)
            documents, borders = self._round(number)
            first = int(np.searchsorted(borders, begin, "right")) - 1
            last = int(np.searchsorted(borders, end, "left"))
            starts = np.maximum(borders[first:last], begin)
            lengths = np.minimum(borders[first + 1 : last + 1], end) - starts
            parts.append(Pieces(documents[first:last], starts - borders[first:last], lengths))
            start, length = start + end - begin, length - (end - begin)
        return parts[0] if len(parts) == 1 else Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def whole(self, first: int, count: int) -> np.ndarray:
        """Numbers of the stream's documents first .. first+count-1, counted over epochs: int64 [count]."""
        parts = []
        per_round = len(self) * self._epochs
        while count:
            number, begin = divmod(first, per_round)
            parts.append(self._round(number).documents[begin : begin + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _lay_out(self, number: int) -> Round:
        epochs = np.arange(number * self._epochs, (number + 1) * self._epochs, dtype=np.uint64)
        keys = splitmix64(splitmix64(epochs) ^ np.uint64(self._key))
        order = permutations(len(self), keys).ravel()
        return Round(self.numbers[order], np.concatenate([[0], np.cumsum(self.lengths[order])]))
