"""Which corpus each sample comes from, so that every prefix of the run holds the wanted shares.

Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980): after any n samples, a corpus of
share w has given n*w samples up to an error of at most 1 - 1/(2c-2), c being the number of corpora. Drawing at random would
be off by the square root of n; taking the largest deficit first is off by more than one sample for some weights.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_BLOCK = 4096


class Blend:
    """The sequence of corpora for the given weights (any positive numbers; only their ratios count).

    The weights are taken as the decimal fractions they were written as, so the sequence repeats after their common
    denominator: 0.7, 0.2, 0.1 after ten samples. One period is computed, in blocks and only as far as asked for (1 us per
    sample and corpus); with weights that have no short period the first access at sample n computes n entries.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        shares = [int(weight * math.lcm(*(w.denominator for w in exact))) for weight in exact]
        self._shares = [share // math.gcd(*shares) for share in shares]
        self._period = sum(self._shares)
        self._lock = threading.Lock()
        self._deficits = [0] * len(shares)
        self._counts = [0] * len(shares)
        self._choice = np.empty(0, np.int32)
        self._number = np.empty(0, np.int64)
        self._prefix = [np.zeros(len(shares), np.int64)]

    def locate(self, index: int) -> tuple[int, int]:
        """Corpus of sample `index`, and how many samples before it came from the same corpus."""
        periods, at = divmod(index, self._period)
        self._extend(at + 1)
        corpus = int(self._choice[at])
        return corpus, periods * self._shares[corpus] + int(self._number[at])

    def counts(self, n: int) -> list[int]:
        """How many of the first n samples come from each corpus."""
        periods, at = divmod(n, self._period)
        self._extend(at)
        block = at // _BLOCK
        counts = self._prefix[block] + np.bincount(self._choice[block * _BLOCK : at], minlength=len(self._shares))
        return [periods * share + int(count) for share, count in zip(self._shares, counts, strict=True)]

    def _extend(self, n: int) -> None:
        with self._lock:
            known = len(self._choice)
            if n <= known:
                return
            choices = [self._next() for _ in range(known, min(self._period, -(-n // _BLOCK) * _BLOCK))]
            new = np.array(choices, np.int32)
            number = np.empty(len(new), np.int64)
            running = self._prefix[-1].copy()
            for start in range(0, len(new), _BLOCK):
                part = new[start : start + _BLOCK]
                for corpus in range(len(self._shares)):
                    mine = np.flatnonzero(part == corpus)
                    number[start + mine] = running[corpus] + np.arange(len(mine))
                    running[corpus] += len(mine)
                if len(part) == _BLOCK:
                    self._prefix.append(running.copy())
            # _number first: a reader that sees the new _choice must find its number too.
            self._number = np.concatenate([self._number, number])
            self._choice = np.concatenate([self._choice, new])

    def _next(self) -> int:
        """Tijdeman's rule in integers, in units of 1/(period * margin): of the corpora whose deficit allows a sample now,
        the one whose sample would be due first."""
        deficits, shares, period = self._deficits, self._shares, self._period
        margin = 2 * len(shares) - 2
        best, due = 0, math.inf
        for corpus, share in enumerate(shares):
            deficits[corpus] += share
            if margin and deficits[corpus] * margin >= period:
                when = (period * (margin - 1) - deficits[corpus] * margin) / share
                if when < due:
                    best, due = corpus, when
        deficits[best] -= period
        return best
