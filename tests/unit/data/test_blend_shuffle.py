"""Shares of the corpora at every prefix, and permutations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.data.blend import Blend
from lctrain.data.shuffle import make_key, permutation, permutations, splitmix64


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.001, 1000, allow_nan=False), min_size=1, max_size=7))
def test_every_prefix_holds_each_share_within_one_sample(weights):
    blend = Blend(weights)
    n = 600
    chosen = np.array([blend.locate(i)[0] for i in range(n)])
    shares = np.array(weights) / np.sum(weights)
    counts = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, n + 1)[:, None] * shares
    assert np.abs(counts - wanted).max() <= max(0.0, 1 - 1 / max(1, 2 * len(weights) - 2)) + 1e-6


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.2, 0.1], [0.123457, 3.1], [5, 1, 1, 1, 0.001]])
def test_numbers_within_a_corpus_count_up_without_gaps(weights):
    blend = Blend(weights)
    seen = [0] * len(weights)
    for i in range(9000):
        if i % 1000 == 0:
            assert blend.counts(i) == seen
        corpus, number = blend.locate(i)
        assert number == seen[corpus]
        seen[corpus] += 1


def test_random_access_equals_sequential_access():
    weights = [0.123457, 1.1, 3.0]
    ahead, steady = Blend(weights), Blend(weights)
    far = ahead.locate(10_000), ahead.counts(4096), ahead.counts(4097)
    for i in range(10_000):
        steady.locate(i)
    assert far == (steady.locate(10_000), steady.counts(4096), steady.counts(4097))


def test_short_periods_reach_far_at_once():
    corpus, number = Blend([0.7, 0.2, 0.1]).locate(10**12)
    assert number == 10**11 * [7, 2, 1][corpus]


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_holds_every_number_once(n):
    assert sorted(permutation(n, 7).tolist()) == list(range(n))


def test_permutations_differ_by_key_and_never_change():
    both = permutations(100, np.array([1, 2]))
    assert (both[0] != both[1]).any()
    # Written down once: a change of these numbers would change the data order of every run that is resumed.
    assert permutation(8, make_key(0, 1)).tolist() == [5, 1, 0, 2, 3, 4, 6, 7]
    assert splitmix64(np.array([0], np.uint64)).tolist() == [0xE220A8397B1DCDAF]  # Vigna's splitmix64.c, seed 0


def test_keys_depend_on_the_order_of_their_parts():
    assert len({make_key(1, 2), make_key(2, 1), make_key(1), make_key(1, 2, 0), make_key()}) == 5
