"""Samples as a pure function of their number: purity, coverage, stages, splits."""

import random

import numpy as np
import pytest

from lctrain.errors import UserError

LENGTHS = [37, 5, 0, 120, 1, 64, 64, 9, 300, 18]


def as_tuple(sample):
    return sample.index, sample.tokens.tolist(), sample.borders, sample.next_token, sample.spans


def check_form(sample, seq_len):
    """What every sample must obey, whatever made it; token ids count up within a document."""
    assert sample.tokens.shape == (seq_len,)
    assert sample.tokens.dtype == np.int64
    assert sample.borders[0] == 0
    assert sample.borders[-1] <= seq_len
    assert all(a < b for a, b in zip(sample.borders, sample.borders[1:], strict=False))
    assert len(sample.spans) == len(sample.borders) - 1
    for begin, end in zip(sample.borders, sample.borders[1:], strict=False):
        assert (np.diff(sample.tokens[begin:end]) == 1).all()
    if sample.next_token is not None:
        assert sample.next_token == sample.tokens[sample.borders[-1] - 1] + 1


@pytest.mark.parametrize("split_documents", [True, False])
def test_random_access_equals_sequential(corpus, source, split_documents):
    prefixes = [corpus(LENGTHS, "a"), corpus([50] * 7, "b", first_id=5000)]
    options = {"weights": [2, 1], "stages": [(3, 16), (5, 40)], "split_documents": split_documents}
    make = lambda: source(prefixes, 64, **options)  # noqa: E731
    steady = make()
    expected = [as_tuple(steady.sample(i)) for i in range(80)]
    order = list(range(80))
    random.Random(1).shuffle(order)
    shuffled = make()
    assert {i: as_tuple(shuffled.sample(i)) for i in order} == dict(enumerate(expected))
    assert as_tuple(make().sample(79)) == expected[79]


@pytest.mark.parametrize("split_documents", [True, False])
def test_form_and_labels(corpus, source, split_documents):
    samples = source(corpus(LENGTHS), 50, stages=[(4, 20)], split_documents=split_documents)
    for i in range(60):
        check_form(samples.sample(i), 20 if i < 16 else 50)
        assert samples.seq_len(i) == (20 if i < 16 else 50)


def test_the_seed_changes_the_order_and_its_absence_does_not(corpus, source):
    prefix = corpus([10] * 50)
    first, again, other = (source(prefix, 20, trainer={"seed": seed}) for seed in (1, 1, 2))
    assert as_tuple(first.sample(3)) == as_tuple(again.sample(3))
    assert any(as_tuple(first.sample(i)) != as_tuple(other.sample(i)) for i in range(5))


def test_every_token_once_per_epoch_when_documents_may_be_split(corpus, source):
    samples = source(corpus(LENGTHS), 103, shuffle_window=3)
    total = sum(LENGTHS)  # 618 = 6 * 103: six samples are exactly one epoch
    for epoch in range(2):
        tokens = np.concatenate([samples.sample(epoch * 6 + i).tokens for i in range(6)])
        assert sorted(tokens.tolist()) == list(range(total))
    assert samples.padding_share() == 0


def test_pieces_of_a_cut_document_continue_each_other(corpus, source):
    samples = source(corpus(LENGTHS), 103, shuffle_window=1)
    for i in range(11):
        here, following = samples.sample(i), samples.sample(i + 1)
        first = following.spans[0]
        if here.next_token is None:
            assert first.offset == 0
        else:
            assert here.next_token == following.tokens[0]
            assert first.document == here.spans[-1].document
            assert first.offset == here.spans[-1].offset + here.borders[-1] - here.borders[-2]


def test_epochs_have_different_orders(corpus, source):
    samples = source(corpus([10] * 40), 400, shuffle_window=1)
    epochs = [tuple(span.document for span in samples.sample(i).spans) for i in range(3)]
    assert len(set(epochs)) == 3
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)


def test_stages_neither_replay_nor_skip(corpus, source):
    total = 8 * 10 + 12 * 25 + 20
    prefix = corpus([7, 93, 50, 1, 149, 100])
    samples = source(prefix, 100, stages=[(2, 10), (3, 25)], shuffle_window=5)
    staged = np.concatenate([samples.sample(i).tokens for i in range(20)])
    # The first 380 of the 400 tokens of epoch 0; the last stage starts with the other 20.
    assert total == 400
    assert len(set(staged.tolist())) == 380
    plain = source(prefix, 400, shuffle_window=1).sample(0).tokens
    assert set(staged.tolist()) == set(plain[:380].tolist())
    # Shuffling within the last stage hides which sample comes first: the window of five covers 500 tokens.
    rest = np.concatenate([samples.sample(20 + i).tokens for i in range(5)])
    stream = np.concatenate([source(prefix, 80, shuffle_window=1).sample(i).tokens for i in range(11)])
    assert sorted(rest.tolist()) == sorted(stream[380:880].tolist())


def test_a_longer_run_sees_the_same_samples(corpus, source):
    prefix = corpus(LENGTHS)
    for split_documents in (True, False):
        options = {"stages": [(2, 9)], "split_documents": split_documents}
        short, long = (source(prefix, 33, trainer={"steps": steps}, **options) for steps in (5, 5000))
        for i in range(40):
            assert as_tuple(short.sample(i)) == as_tuple(long.sample(i))


def test_blocks_are_shuffled_but_keep_their_samples(corpus, source):
    prefix = corpus([1000])
    plain, mixed = (source(prefix, 10, shuffle_window=window) for window in (1, 25))
    for block in range(4):
        numbers = range(block * 25, block * 25 + 25)
        before, after = ([int(s.sample(i).tokens[0]) for i in numbers] for s in (plain, mixed))
        assert before != after
        assert sorted(before) == sorted(after)


def test_one_document_shorter_than_a_sample_fills_it_with_epochs(corpus, source):
    sample = source(corpus([7]), 24, shuffle_window=1).sample(0)
    check_form(sample, 24)
    assert sample.borders == (0, 7, 14, 21, 24)
    assert sample.next_token == 3
    assert [span.document for span in sample.spans] == [0] * 4


def test_a_corpus_of_one_token(corpus, source):
    sample = source(corpus([1]), 200_000).sample(3)
    assert len(sample.borders) == 200_001
    assert sample.next_token is None


def test_held_out_documents_are_disjoint_and_do_not_move(corpus, source):
    few, many = corpus([10] * 400, "few"), corpus([10] * 800, "many")
    seen = {}
    for prefix in (few, many):
        for split in ("train", "valid"):
            samples = source(prefix, 100, split=split, valid_fraction=0.2)
            seen[prefix, split] = {span.document for i in range(90) for span in samples.sample(i).spans}
        assert not seen[prefix, "train"] & seen[prefix, "valid"]
    assert seen[few, "train"] | seen[few, "valid"] == set(range(400))
    assert 40 < len(seen[few, "valid"]) < 120
    assert seen[few, "valid"] == {d for d in seen[many, "valid"] if d < 400}


def test_evaluation_does_not_depend_on_the_seed_or_the_stages(corpus, source):
    prefix = corpus([10] * 200)
    options = {"split": "valid", "valid_fraction": 0.3}
    one = source(prefix, 50, trainer={"seed": 1}, **options)
    two = source(prefix, 50, stages=[(5, 8)], trainer={"seed": 2}, **options)
    assert [as_tuple(one.sample(i)) for i in range(5)] == [as_tuple(two.sample(i)) for i in range(5)]


def test_training_keeps_a_document_and_evaluation_says_what_is_missing(corpus, source):
    prefix = corpus([10, 20])
    assert source(prefix, 10, valid_fraction=1.0).sample(0).tokens.size == 10
    with pytest.raises(UserError, match="no document is held out"):
        source(prefix, 10, split="valid")


def test_blend_draws_each_corpus_by_its_weight(corpus, source):
    prefixes = [corpus([10] * 5, "a"), corpus([30] * 5, "b", first_id=1000), corpus([7] * 5, "c", first_id=2000)]
    samples = source(prefixes, 25, weights=[0.5, 0.3, 0.2])
    corpora = [{span.corpus for span in samples.sample(i).spans} for i in range(100)]
    assert all(len(found) == 1 for found in corpora)
    assert [sum(found == {c} for found in corpora) for c in range(3)] == [50, 30, 20]
    for i in range(100):
        assert samples.sample(i).tokens.min() // 1000 == samples.sample(i).spans[0].corpus


def test_a_token_beyond_the_vocabulary_is_named(corpus, source):
    with pytest.raises(UserError, match=r"token id 299.*vocabulary has 257.*at least 300"):
        source(corpus([300]), 300, vocab=257).sample(0)


def test_empty_and_missing_corpora(corpus, source, tmp_path):
    with pytest.raises(UserError, match="no tokens"):
        source(corpus([0, 0]), 10)
    with pytest.raises(UserError, match="does not exist"):
        source(str(tmp_path / "nowhere"), 10)


def test_a_corpus_without_sidecar_is_padded_with_the_tokenizers_end_of_document(corpus, source):
    samples = source(corpus([10], sidecar=False), 16, split_documents=False)
    assert samples.pad_id == 256
    assert samples.sample(0).tokens.tolist() == [*range(10), *[256] * 6]
