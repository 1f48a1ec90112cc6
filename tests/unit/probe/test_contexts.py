"""Texts of the probe: what stands where, that rows are full and separate, and that the passage is nowhere else."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctrain.config.probe import ProbeConfig
from lctrain.data.batch import DocumentSpan, PackedSample
from lctrain.errors import UserError
from lctrain.probe.contexts import UNSCORED, ProbeTexts, without

PAD = 999


@dataclasses.dataclass
class Stream:
    """Samples of a stream of made-up text with ends of documents (PAD) and padding in them."""

    period: int | None = None
    length: int = 50
    pad_id: int = PAD

    def sample(self, index: int) -> PackedSample:
        random = np.random.default_rng(index if self.period is None else index % self.period)
        tokens = random.integers(0, 50, self.length)
        tokens[10], tokens[-5:] = PAD, PAD
        return PackedSample(index, tokens, (0, 20, self.length - 5), None, (DocumentSpan(3, 0, 0), DocumentSpan(4, 1, 0)))


def texts_of(config: ProbeConfig, seq_len: int, source) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(length, tokens, cells) of every text, in the order of rows."""
    texts, found = ProbeTexts(config, seq_len, source), []
    for row in range(texts.rows):
        sample, cells = texts.sample(row), texts.cells_of(row)
        assert len(sample.tokens) == len(cells) == seq_len
        assert len(sample.spans) == len(sample.borders) - 1
        assert (sample.tokens[sample.borders[-1] :] == PAD).all()
        assert (cells[sample.borders[-1] :] == UNSCORED).all()
        for start, end in itertools.pairwise(sample.borders):
            found.append((end - start, sample.tokens[start:end], cells[start:end]))
    return found


def test_what_stands_where():
    config = ProbeConfig(every=1, lengths=4, depths=3, passage=9, passages=2)
    found = texts_of(config, 150, Stream())
    assert [length for length, *_ in found] == [150] * 8 + [75] * 8 + [37] * 8  # 18 is less than four passages
    for group, length in enumerate((150, 75, 37)):
        for number in range(2):
            *planted, control = found[8 * group + 4 * number : 8 * group + 4 * number + 4]
            passage = control[1][-9:]
            for depth, (_, tokens, cells) in enumerate(planted):
                start = (0, round((length - 18) / 2), length - 18)[depth]
                assert (tokens[start : start + 9] == passage).all()
                assert (tokens[-9:] == passage).all()
                rest = np.delete(tokens[:-9], np.s_[start : start + 9])
                assert (rest == control[1][: length - 18]).all()  # the same text around
                # Scored are predictions of the last 6 tokens, each at the place of the token before.
                assert np.flatnonzero(cells != UNSCORED).tolist() == list(range(length - 7, length - 1))
                assert set(cells[length - 7 : length - 1]) == {4 * group + depth}
            assert set(control[2][length - 7 : length - 1]) == {4 * group + 3}
            windows = np.lib.stride_tricks.sliding_window_view(control[1][:-9], 9)
            assert not (windows == passage).all(axis=1).any()
    assert all(PAD not in tokens for _, tokens, _ in found)


def test_the_same_for_every_run_and_padding_rows_after_the_last():
    config = ProbeConfig(every=1, lengths=2, passage=6, passages=3)
    first, second = (ProbeTexts(config, 40, Stream()) for _ in range(2))
    assert all((first.sample(row).tokens == second.sample(row).tokens).all() for row in range(first.rows))
    assert first.sample(first.rows + 1).borders == (0, 1)
    assert (first.cells_of(first.rows + 1) == UNSCORED).all()
    assert {span.corpus for row in range(first.rows) for span in first.sample(row).spans} == {3}


def test_few_held_out_documents_come_round_without_the_passage():
    for _, tokens, _ in texts_of(ProbeConfig(every=1, lengths=1, depths=2, passage=12, passages=1), 400, Stream(period=2)):
        windows = np.lib.stride_tricks.sliding_window_view(tokens, 12)
        assert (windows == tokens[-12:]).all(axis=1).sum() <= 2


def test_documents_that_say_nothing_else_are_refused():
    class Same(Stream):
        def sample(self, index):
            sample = super().sample(index)
            return dataclasses.replace(sample, tokens=np.zeros_like(sample.tokens))

    class Empty(Stream):
        def sample(self, index):
            sample = super().sample(index)
            return dataclasses.replace(sample, tokens=np.full_like(sample.tokens, PAD))

    config = ProbeConfig(every=1, passage=6)
    with pytest.raises(UserError, match="one passage over and over"):
        ProbeTexts(config, 100, Same()).sample(0)
    with pytest.raises(UserError, match="are empty"):
        ProbeTexts(config, 100, Empty())


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_cut_out(tokens, passage):
    left = without(np.array(tokens, np.int64), np.array(passage, np.int64)).tolist()
    assert not any(left[i : i + len(passage)] == passage for i in range(len(left) - len(passage) + 1))
    assert (len(tokens) - len(left)) % len(passage) == 0
    rest = iter(tokens)
    assert all(token in rest for token in left)  # in their order
