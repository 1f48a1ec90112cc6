"""Step batches: who gets which rows, labels and positions, threads."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from lctrain.data.loader import Loader
from lctrain.parallel.layout import IGNORE, SequenceLayout

LENGTHS = [37, 5, 120, 1, 64, 64, 9, 300, 18] * 4
SEQ_LEN = 53  # divides by nothing: layouts have to pad


@pytest.fixture
def load(corpus, source, data_config, trainer_config):
    """load(...): a Loader over one small corpus."""
    prefix = corpus(LENGTHS)

    def make(kind="zigzag", cp=(0, 1), dp=(0, 1), start_step=0, stop_step=None, samples=None, stages=(), data=None, **trainer):
        data = {"prefetch": 2, "workers": 1, **(data or {})}
        trainer = {"global_batch": 8, "micro_batch": 2, "steps": 6, **trainer}
        samples = samples or source(prefix, SEQ_LEN, stages=stages, trainer=trainer, **data)
        return Loader(
            samples,
            kind,
            *cp,
            *dp,
            trainer_config(SEQ_LEN, stages, **trainer),
            data_config(prefix, **data),
            start_step=start_step,
            stop_step=stop_step,
        )

    return make


def whole_rows(load, kind, cp, dp, micro_batch, field, **options):
    """{sample: row} of all steps, put together from all ranks."""
    rows = {}
    for d in range(dp):
        ranks = []
        for c in range(cp):
            with load(kind, (c, cp), (d, dp), micro_batch=micro_batch, **options) as loader:
                ranks.append([m for batch in loader for m in batch.micro_batches])
        for shards in zip(*ranks, strict=True):
            layout = shards[0].layout
            assert {m.samples for m in shards} == {shards[0].samples}
            whole = layout.unshard([getattr(m, field) for m in shards], dim=1)
            for sample, row in zip(shards[0].samples, whole, strict=True):
                assert sample not in rows
                rows[sample] = row.tolist()
    return rows


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped", "balanced"])
@pytest.mark.parametrize("field", ["tokens", "labels", "positions"])
def test_rows_do_not_depend_on_the_layout_of_ranks(load, kind, field):
    expected = whole_rows(load, kind, 1, 1, 1, field)
    assert sorted(expected) == list(range(48))
    for cp, dp, micro_batch in [(1, 2, 4), (2, 1, 8), (3, 4, 1), (4, 2, 2)]:
        assert whole_rows(load, kind, cp, dp, micro_batch, field) == expected
    assert whole_rows(load, kind, 2, 2, 1, field, data={"workers": 3, "prefetch": 5}) == expected


def test_row_j_of_micro_batch_m_of_rank_d(load):
    with load(dp=(1, 2), micro_batch=2, global_batch=8) as loader:
        for step, batch in enumerate(loader):
            assert (batch.step, batch.consumed) == (step, step * 8)
            assert [m.samples for m in batch.micro_batches] == [(step * 8 + 2, step * 8 + 3), (step * 8 + 6, step * 8 + 7)]
    assert step == 5


def test_resume_at_any_step_with_another_layout(load):
    expected = whole_rows(load, "zigzag", 1, 1, 2, "tokens")
    for start in (1, 5):
        resumed = whole_rows(load, "striped", 2, 4, 1, "tokens", start_step=start)
        assert resumed == {sample: row for sample, row in expected.items() if sample >= start * 8}
    with load(start_step=6) as loader:
        assert list(loader) == []


def test_labels_are_the_next_token_of_the_same_document(load):
    with load(micro_batch=8) as loader:
        for batch in loader:
            (micro,) = batch.micro_batches
            for row, borders in enumerate(micro.borders):
                tokens, labels, positions = (x[row].tolist() for x in (micro.tokens, micro.labels, micro.positions))
                sample = loader._source.sample(micro.samples[row])
                for begin, end in itertools.pairwise(borders):
                    assert positions[begin:end] == list(range(end - begin))
                    assert labels[begin : end - 1] == tokens[begin + 1 : end]
                    if end < SEQ_LEN:
                        assert labels[end - 1] == IGNORE
                assert labels[-1] == (IGNORE if sample.next_token is None else sample.next_token)
            assert micro.targets == int((micro.labels != IGNORE).sum())


def test_padding_has_no_labels_and_targets_count_whole_rows(load):
    for rank in range(4):
        with load(cp=(rank, 4), data={"split_documents": False}) as loader:
            for batch in loader:
                for micro in batch.micro_batches:
                    assert micro.tokens.shape == micro.labels.shape == (2, SequenceLayout("zigzag", 4, SEQ_LEN).local_length)
                    at = micro.layout.indices(rank)
                    for row, borders in enumerate(micro.borders):
                        padding = at >= borders[-1]
                        assert (micro.labels[row][padding] == IGNORE).all()
                        assert (micro.tokens[row][padding] == 256).all()
                    wholes = [loader._source.sample(i) for i in micro.samples]
                    whole = sum(s.borders[-1] - (len(s.borders) - 1) + (s.next_token is not None) for s in wholes)
                    assert micro.targets == whole


def test_digest_is_equal_within_a_context_parallel_group_only(load):
    def digests(**options):
        with load(**options) as loader:
            return [batch.digest for batch in loader]

    first = digests(cp=(0, 2), dp=(0, 2))
    assert first == digests(cp=(1, 2), dp=(0, 2))
    assert set(first).isdisjoint(digests(cp=(0, 2), dp=(1, 2)))
    assert len(set(first)) == 6


def test_stages_change_the_length_of_the_rows(load):
    with load(stages=[(2, 10), (1, 20)]) as loader:
        assert [batch.micro_batches[0].layout.length for batch in loader] == [10, 10, 20, SEQ_LEN, SEQ_LEN, SEQ_LEN]


class Failing:
    pad_id = 0

    def __init__(self, at, delay=0.0):
        self.at, self.delay, self.asked = at, delay, []

    def sample(self, index):
        self.asked.append(index)
        time.sleep(self.delay)
        if index == self.at:
            raise ValueError(f"sample {index} is broken")
        from lctrain.data.batch import DocumentSpan, PackedSample

        return PackedSample(index, np.full(SEQ_LEN, index), (0, SEQ_LEN), None, (DocumentSpan(0, 0, 0),))


@pytest.mark.parametrize("workers", [1, 3])
def test_an_exception_comes_in_its_step_and_ends_the_threads(load, workers):
    loader = load(samples=Failing(19), data={"workers": workers, "prefetch": 4})
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(ValueError, match="sample 19 is broken") as caught:
        next(loader)
    assert any(entry.name == "sample" for entry in caught.traceback)
    assert not any(thread.is_alive() for thread in loader._threads)
    with pytest.raises(StopIteration):
        next(loader)


def test_close_stops_threads_at_once_and_they_are_daemons(load):
    loader = load(samples=Failing(-1), steps=10**6)
    next(loader)
    assert all(thread.daemon for thread in loader._threads)
    started = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - started < 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]


def test_prepares_no_further_than_prefetch(load):
    samples = Failing(-1)
    with load(samples=samples, data={"prefetch": 3, "workers": 2}) as loader:
        next(loader)
        deadline = time.monotonic() + 5
        while len(samples.asked) < 4 * 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert max(samples.asked) == 4 * 8 - 1


def test_wait_is_long_only_when_the_data_is_late(load):
    with load(samples=Failing(-1, delay=0.01), global_batch=8) as loader:
        next(loader)
        assert loader.wait_s > 0.05
        time.sleep(0.4)
        next(loader)
        assert loader.wait_s < 0.05


def test_evaluation_sees_the_same_batches_every_time(load, source, corpus):
    samples = source(corpus([20] * 100, "more"), SEQ_LEN, split="valid", valid_fraction=0.3)
    rounds = []
    for _ in range(2):
        with load(samples=samples, stop_step=2) as loader:
            rounds.append([micro.tokens for batch in loader for micro in batch.micro_batches])
    assert len(rounds[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*rounds, strict=True))
