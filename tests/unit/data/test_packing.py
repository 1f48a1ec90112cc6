"""Whole documents packed into samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.data import packing
from lctrain.data.packing import best_fit_decreasing


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80))
def test_bins_hold_what_fits_and_could_not_be_merged(lengths):
    lengths = np.array(lengths, np.int64)
    bins = best_fit_decreasing(lengths, 50)
    if not len(lengths):
        assert not len(bins)
        return
    fill = np.bincount(bins, weights=lengths)
    assert fill.max() <= 50
    assert fill.min() > 0
    # No two bins would fit in one, so at least all but one are more than half full.
    assert sum(sorted(fill)[:2]) > 50 or len(fill) == 1


def test_worst_known_case_stays_in_the_bound_of_best_fit_decreasing():
    lengths = np.random.default_rng(0).integers(1, 1000, 5000)
    bins = best_fit_decreasing(lengths, 1000)
    assert bins.max() + 1 <= 11 / 9 * np.ceil(lengths.sum() / 1000) + 1


def collect(samples, numbers):
    """Every piece as (document, offset, length), and all tokens."""
    pieces, tokens = [], []
    for i in numbers:
        sample = samples.sample(i)
        for span, begin, end in zip(sample.spans, sample.borders, sample.borders[1:], strict=False):
            pieces.append((span.document, span.offset, end - begin))
            tokens += sample.tokens[begin:end].tolist()
    return pieces, tokens


def samples_of_one_epoch(samples, total):
    count, used = 0, 0
    while used < total:
        used += samples.sample(count).borders[-1]
        count += 1
    assert used == total
    return count


def test_short_documents_stay_whole_and_waste_is_low(corpus, source):
    lengths = np.random.default_rng(1).lognormal(5, 1, 3000).astype(int).clip(1, 4000)
    samples = source(corpus(lengths), 2048, split_documents=False)
    count = samples_of_one_epoch(samples, lengths.sum())
    pieces, tokens = collect(samples, range(count))
    assert sorted(tokens) == list(range(lengths.sum()))
    for document, offset, length in pieces:
        if lengths[document] <= 2048:
            assert (offset, length) == (0, lengths[document])
        else:
            assert offset % 2048 == 0
            assert length == min(2048, lengths[document] - offset)
    assert 1 - lengths.sum() / (count * 2048) < 0.02
    assert samples.padding_share() < 0.02


def test_pieces_of_long_documents_know_what_follows(corpus, source):
    lengths = [1000, 30, 40, 250, 100]
    samples = source(corpus(lengths), 100, split_documents=False)
    for i in range(40):
        sample = samples.sample(i)
        last = sample.spans[-1]
        end = last.offset + sample.borders[-1] - sample.borders[-2]
        assert (sample.next_token is not None) == (end < lengths[last.document])
        assert (sample.tokens[sample.borders[-1] :] == samples.pad_id).all()


def test_corpora_smaller_than_a_sample_are_packed_over_epochs(corpus, source):
    samples = source(corpus([10, 20, 33]), 1000, split_documents=False)
    assert np.mean([samples.sample(i).borders[-1] for i in range(30)]) > 900
    assert samples.padding_share() < 0.1


STAGES = [[], [(1, 64)], [(2, 50), (3, 200)], [(1, 7), (1, 300)], [(40, 64)], [(1, 30), (1, 40), (1, 50), (1, 60)]]


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("window", [1, 5])
def test_stages_neither_replay_nor_skip(corpus, source, monkeypatch, stages, window):
    monkeypatch.setattr(packing, "_MANY", 1)  # many small windows
    lengths = np.random.default_rng(2).integers(1, 400, 100)
    options = {"stages": stages, "shuffle_window": window, "trainer": {"global_batch": 3}}
    samples = source(corpus(lengths), 100, split_documents=False, **options)
    i = 0
    for _ in range(3):  # after every window was visited, every token was seen once
        tokens = []
        while len(tokens) < lengths.sum():
            tokens += collect(samples, [i])[1]
            i += 1
        assert sorted(tokens) == list(range(lengths.sum()))


def test_a_stage_without_samples_of_a_corpus_hands_on_what_it_was_given(corpus, source):
    lengths = np.random.default_rng(3).integers(1, 400, 40)
    prefixes = [corpus(lengths, "a"), corpus(lengths, "b")]
    stages = [(1, 30), (1, 40), (1, 50), (1, 60), (1, 70)]  # one sample each, from a and b in turn
    samples = source(prefixes, 100, stages=stages, split_documents=False, trainer={"global_batch": 1})
    tokens = {0: [], 1: []}
    i = 0
    while min(map(len, tokens.values())) < lengths.sum():
        sample = samples.sample(i)
        tokens[sample.spans[0].corpus] += sample.tokens[: sample.borders[-1]].tolist()
        i += 1
    for seen in tokens.values():
        assert sorted(seen[: lengths.sum()]) == list(range(lengths.sum()))


def test_what_a_stage_leaves_over_keeps_its_targets(corpus, source):
    lengths = np.array([1000] * 30 + [35] * 30)
    samples = source(corpus(lengths), 400, stages=[(3, 100)], split_documents=False)
    longest = 0
    for i in range(12, 90):
        sample = samples.sample(i)
        ends = [span.offset + length for span, length in zip(sample.spans, np.diff(sample.borders), strict=True)]
        continuing = [end < lengths[span.document] for span, end in zip(sample.spans, ends, strict=True)]
        assert any(continuing) == (sample.next_token is not None)
        longest = max(longest, *np.diff(sample.borders))
    assert longest == 400  # neighbouring pieces of 100 became one again


def test_far_access_packs_every_window_only_once(corpus, source, monkeypatch):
    packed = []
    real = packing.best_fit_decreasing
    monkeypatch.setattr(packing, "best_fit_decreasing", lambda *args: packed.append(len(args[0])) or real(*args))
    samples = source(corpus([50] * 100), 100, split_documents=False)
    samples.sample(1_000_000)
    assert sum(packed) <= 100 * 4
