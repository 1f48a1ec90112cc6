"""Settings as YAML, and back without loss."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.config.load import load
from lctrain.config.render import COMMENT_COLUMN, describe, from_yaml, render, to_yaml
from lctrain.config.schema import CorpusConfig, DataConfig, TrainConfig
from lctrain.config.strict import Strict
from lctrain.errors import UserError


class Probe(Strict):
    """Values that YAML could misread."""

    text: str
    """Any text."""
    number: float = 1e-3
    """Any number."""
    texts: tuple[str, ...] = ()
    """A list."""


@pytest.mark.parametrize("write", [to_yaml, render])
def test_a_whole_config_survives(write):
    config = load(TrainConfig, "train", ["recipe=demo", "optim.lr=1e-7", "trainer.stages=[{steps: 5, seq_len: 64}]"])
    assert from_yaml(TrainConfig, write(config)) == config


@pytest.mark.parametrize("write", [to_yaml, render])
@pytest.mark.parametrize(
    "text", ["", "null", "1e-3", "12", "yes", "${a.b}", "???", "a: b # c", "two\nlines", "é", "\x00", "- x", "'", " "]
)
def test_awkward_text_survives(write, text):
    probe = Probe(text=text, texts=(text, "x"))
    assert from_yaml(Probe, write(probe)) == probe


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False, allow_infinity=False))
def test_any_value_survives(text, number):
    probe = Probe(text=text, number=number)
    assert from_yaml(Probe, to_yaml(probe)) == probe
    assert from_yaml(Probe, render(probe)) == probe


def test_numbers_as_people_write_them():
    assert from_yaml(Probe, "text: a\nnumber: 1e-3\n").number == 1e-3


@pytest.mark.parametrize("text", ["text: [", "text: a\nother: 1\n", "- 1\n", "", "text: 3\n"])
def test_what_does_not_fit_is_refused(text):
    with pytest.raises(UserError) as caught:
        from_yaml(Probe, text)
    assert "\n" not in str(caught.value)


def test_render_says_what_each_setting_means_and_what_was_changed():
    text = render(load(TrainConfig, "train", ["trainer.steps=7"]))
    line = next(line for line in text.splitlines() if line.lstrip().startswith("steps: 7"))
    assert line.index("#") == COMMENT_COLUMN + 1
    assert line.endswith("# Optimizer steps of the whole run. [default: 100]")
    assert "# The network.\nmodel:" in text
    assert max(map(len, text.splitlines())) <= 128


def test_render_lists_sections():
    data = DataConfig(corpora=(CorpusConfig(prefix="a"), CorpusConfig(prefix="b", weight=2.0)))
    assert from_yaml(DataConfig, render(data)) == data
    assert "  - prefix: b" in render(data)


def test_describe_names_every_plain_setting():
    rows = {name: (expected, default, doc) for name, expected, default, doc in describe(TrainConfig)}
    assert rows["trainer.steps"] == ("a whole number above 0", "100", "Optimizer steps of the whole run.")
    assert rows["model.d_model"][1] == ""
    assert "model" not in rows
