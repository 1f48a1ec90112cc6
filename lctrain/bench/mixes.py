"""Mixes of document lengths on which layouts are compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np


def _log_normal(rng: np.random.Generator, length: int) -> Iterator[float]:
    """Text from the web: half the documents below 1,100 tokens, a few very long ones."""
    while True:
        yield rng.lognormal(np.log(1100), 1.4)


def _power_law(rng: np.random.Generator, length: int) -> Iterator[float]:
    """Books, code repositories and web pages together: lengths from 300 tokens on fall with exponent 1.1."""
    while True:
        yield 300 * (1 + rng.pareto(1.1))


def _uniform(rng: np.random.Generator, length: int) -> Iterator[float]:
    """Anything between one token and a quarter of the sequence."""
    while True:
        yield rng.uniform(1, length / 4)


def _one_long(rng: np.random.Generator, length: int) -> Iterator[float]:
    """Many short documents and one of two fifths of the sequence amid them."""
    short = _log_normal(rng, length)
    yield from itertools.takewhile(lambda _: rng.uniform() > 0.01, short)
    yield 0.4 * length
    yield from short


def _one(rng: np.random.Generator, length: int) -> Iterator[float]:
    """A single document."""
    yield length


MIXES: dict[str, Callable[[np.random.Generator, int], Iterator[float]]] = {
    "log-normal": _log_normal,
    "power law": _power_law,
    "uniform": _uniform,
    "many short, one long": _one_long,
    "one document": _one,
}


def mixed_borders(mix: str, length: int, seed: int) -> tuple[int, ...]:
    """Borders 0 = c0 < ... < cn = length of documents drawn from one of MIXES; the last one is cut off at the end."""
    borders = [0]
    lengths = MIXES[mix](np.random.default_rng(seed), length)
    while borders[-1] < length:
        borders.append(min(length, borders[-1] + max(1, round(next(lengths)))))
    return tuple(borders)
