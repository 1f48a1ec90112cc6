"""Samples made of whole documents: only documents longer than a sample are split, and what stays free is padding."""

from __future__ import annotations

import bisect
import functools
import threading
from typing import NamedTuple

import numpy as np

from lctrain.data.documents import Documents, Pieces
from lctrain.data.shuffle import make_key, permutation

_FEW, _MANY = 16, 256
"""Samples per window: 16 even for the smallest corpus (a window's last sample is half empty on average), and 256 where there
is enough text, which brings the waste of best-fit decreasing close to none."""


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of every item, int64 [n], bins counted from 0 in the order of their opening; all lengths in 1..capacity.

    Longest first, each into the fullest bin that still takes it (Johnson 1974: at most 11/9 of the fewest possible bins).
    """
    order = np.argsort(-lengths, kind="stable")
    free: list[int] = []  # sorted; free tokens of an open bin in the high bits, its number in the low 32
    chosen = []
    opened = 0
    for length in lengths[order].tolist():
        at = bisect.bisect_left(free, length << 32)
        if at == len(free):
            slot = (capacity << 32) + opened
            opened += 1
        else:
            slot = free.pop(at)
        chosen.append(slot & 0xFFFFFFFF)
        slot -= length << 32
        if slot >> 32:
            bisect.insort(free, slot)
    bins = np.empty(len(lengths), np.int64)
    bins[order] = chosen
    return bins


class Windows:
    """A fixed division of the documents into windows, and an endless order in which to visit them.

    What is packed together is the same in every epoch; that costs nothing, since documents in one sample do not see each
    other, and means that every window is packed once however many epochs a run lasts. Each round visits all windows in a new
    order. `seq_len` is the longest of the run.
    """

    def __init__(self, documents: Documents, seq_len: int, window: int, key: int) -> None:
        self.dataset = documents.dataset
        epochs = -(-_FEW * seq_len // documents.epoch_tokens)
        self._base = documents.whole(0, len(documents) * epochs)
        tokens = documents.epoch_tokens * epochs
        self.count = min(len(self._base), max(1, tokens // (max(_MANY, window) * seq_len)))
        self._order = functools.lru_cache(maxsize=2)(lambda number: permutation(self.count, make_key(key, number)))

    def at(self, visit: int) -> int:
        """Number of the window at one place of the endless order."""
        number, place = divmod(visit, self.count)
        return int(self._order(number)[place])

    def documents(self, window: int) -> Pieces:
        """The whole documents of a window."""
        first, end = (len(self._base) * n // self.count for n in (window, window + 1))
        numbers = self._base[first:end]
        return Pieces(numbers, np.zeros_like(numbers), self.dataset.lengths[numbers])


class _Packed(NamedTuple):
    """All pieces of a window, sample by sample, and the first piece of each sample and the end."""

    pieces: Pieces
    borders: np.ndarray

    def __len__(self) -> int:
        return len(self.borders) - 1

    def sample(self, number: int) -> Pieces:
        part = slice(int(self.borders[number]), int(self.borders[number + 1]))
        return Pieces(*(column[part] for column in self.pieces))


class Packer:
    """The samples of one stage: window after window, the samples of each in a shuffled order.

    To find a sample, the windows visited before its own must have been packed once, to know how many samples they make (half
    a microsecond per document, for at most one epoch); the counts are kept.
    """

    def __init__(self, windows: Windows, seq_len: int, key: int, visit: int, carried: Pieces | None) -> None:
        """`visit`: where in the order of windows the stage starts; `carried`: what the stage before left of its last one."""
        self.windows = windows
        self._seq_len = seq_len
        self._key = key
        self._first_visit = visit
        self._carried = _pack(carried, seq_len, windows.dataset.lengths) if carried is not None else None
        self._packed = functools.lru_cache(maxsize=4)(
            lambda window: _pack(windows.documents(window), seq_len, windows.dataset.lengths)
        )
        self._counts: dict[int, int] = {}
        self._ends = [0] if self._carried is None else [0, len(self._carried)]
        self._lock = threading.Lock()

    def pieces(self, number: int) -> Pieces:
        """Parts of the stage's sample `number`; one that continues elsewhere comes last."""
        turn, at = self._find(number)
        return self._packed_at(turn).sample(int(self._order(turn)[at]))

    def rest(self, samples: int) -> tuple[int, Pieces | None]:
        """Where the next stage starts if this one ends after `samples`: its first visit, and the pieces left over."""
        turn, at = self._find(samples)
        if not at:
            left, turn = [], turn - 1
        else:
            left = [self._packed_at(turn).sample(int(sample)) for sample in self._order(turn)[at:]]
        if turn < 0 and self._carried is not None:
            left, turn = [self._carried.pieces], 0
        visit = self._first_visit + turn + (self._carried is None)
        return visit, _joined(Pieces(*(np.concatenate(column) for column in zip(*left, strict=True)))) if left else None

    def padding_share(self) -> float:
        """Share of the tokens that is padding in the first window."""
        packed = self._packed(self.windows.at(self._first_visit))
        return 1 - int(packed.pieces.lengths.sum()) / (len(packed) * self._seq_len)

    def _find(self, number: int) -> tuple[int, int]:
        """Turn (the carried pieces, if any, then the visits of the stage) and place in it of a sample."""
        with self._lock:
            while self._ends[-1] <= number:
                window = self.windows.at(self._visit(len(self._ends) - 1))
                if window not in self._counts:
                    self._counts[window] = len(self._packed(window))
                self._ends.append(self._ends[-1] + self._counts[window])
            turn = bisect.bisect_right(self._ends, number) - 1
        return turn, number - self._ends[turn]

    def _visit(self, turn: int) -> int:
        return self._first_visit + turn - (self._carried is not None)

    def _packed_at(self, turn: int) -> _Packed:
        if turn == 0 and self._carried is not None:
            return self._carried
        return self._packed(self.windows.at(self._visit(turn)))

    def _order(self, turn: int) -> np.ndarray:
        return permutation(self._ends[turn + 1] - self._ends[turn], make_key(self._key, turn))


def _pack(ranges: Pieces, seq_len: int, document_lengths: np.ndarray) -> _Packed:
    pieces = _cut(ranges, seq_len)
    full = pieces.lengths == seq_len
    bins = np.empty(len(full), np.int64)
    bins[full] = np.arange(full.sum())
    bins[~full] = best_fit_decreasing(pieces.lengths[~full], seq_len) + full.sum()
    continues = pieces.offsets + pieces.lengths < document_lengths[pieces.documents]
    order = np.lexsort((continues, bins))
    return _Packed(Pieces(*(column[order] for column in pieces)), np.concatenate([[0], np.cumsum(np.bincount(bins))]))


def _cut(ranges: Pieces, seq_len: int) -> Pieces:
    """The same tokens with every range longer than seq_len cut into pieces of seq_len and a rest."""
    count = -(-ranges.lengths // seq_len)
    which = np.repeat(np.arange(len(count)), count)
    at = (np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)) * seq_len
    return Pieces(ranges.documents[which], ranges.offsets[which] + at, np.minimum(seq_len, ranges.lengths[which] - at))


def _joined(pieces: Pieces) -> Pieces:
    """The same tokens with neighbouring pieces of a document made one again, so that a longer stage cuts them afresh."""
    order = np.lexsort((pieces.offsets, pieces.documents))
    documents, offsets, lengths = (column[order] for column in pieces)
    new = np.ones(len(order), bool)
    new[1:] = (documents[1:] != documents[:-1]) | (offsets[1:] != (offsets + lengths)[:-1])
    return Pieces(documents[new], offsets[new], np.add.reduceat(lengths, np.flatnonzero(new)))
