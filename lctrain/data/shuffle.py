"""Random order that is a pure function of its keys.

Built on the splitmix64 finaliser (Steele et al. 2014) and not on numpy's generators: their streams may change between numpy
versions, and an order of the data that changes with an upgrade is an order that no resume can rely on.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Scrambled 64-bit numbers, uint64 of x's shape; a bijection, so different inputs give different outputs."""
    x = np.asarray(x).astype(np.uint64) + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def make_key(*parts: int) -> int:
    """One 64-bit key from any sequence of non-negative integers; their order counts."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix64(key ^ splitmix64(np.array([part & (2**64 - 1)], np.uint64)))
    return int(key[0])


def permutations(n: int, keys: np.ndarray) -> np.ndarray:
    """One permutation of 0..n-1 for each key: int64 [len(keys), n]."""
    keys = np.asarray(keys, np.uint64)
    return np.argsort(splitmix64(keys[:, None] + np.arange(n, dtype=np.uint64)), axis=1)


def permutation(n: int, key: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n]. Hashes of different numbers differ, so the order has no ties."""
    return permutations(n, np.array([key], np.uint64))[0]
