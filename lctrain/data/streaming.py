"""Samples cut from the endless stream of documents: every sample is full, and a document may continue in the next one."""

from __future__ import annotations

import functools

import numpy as np

from lctrain.data.documents import Documents, Pieces
from lctrain.data.shuffle import make_key, permutation


class StreamCutter:
    """The samples of one stage: the stream from token `start` on, cut every `seq_len` tokens, in a shuffled order.

    The order is shuffled within blocks of `window` samples. The last block of a stage of known size (`samples`) is shorter,
    so that the stage covers exactly its part of the stream; a stage without end has only whole blocks, so that its order
    does not depend on how long the run will be.
    """

    def __init__(self, documents: Documents, seq_len: int, window: int, key: int, start: int, samples: int | None) -> None:
        self._documents = documents
        self._seq_len = seq_len
        self._window = window
        self._key = key
        self._start = start
        self._samples = samples
        self._order = functools.lru_cache(maxsize=4)(self._shuffle)

    def pieces(self, number: int) -> Pieces:
        """Parts of the stage's sample `number`, in order."""
        block, at = divmod(number, self._window)
        cut = block * self._window + int(self._order(block)[at])
        return self._documents.pieces(self._start + cut * self._seq_len, self._seq_len)

    def end(self) -> int:
        """Stream position at which the next stage starts."""
        assert self._samples is not None, "a stage without end has no next stage"
        return self._start + self._samples * self._seq_len

    def _shuffle(self, block: int) -> np.ndarray:
        left = self._window if self._samples is None else self._samples - block * self._window
        return permutation(min(self._window, left), make_key(self._key, block))
