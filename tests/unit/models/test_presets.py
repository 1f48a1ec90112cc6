"""Presets have the sizes that were published for the models they are named after."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import lctrain
from lctrain.config.load import load
from lctrain.config.model import ModelConfig
from lctrain.config.strict import Strict
from lctrain.models.pattern import parse_pattern
from lctrain.models.size import model_size

NAMES = sorted(path.stem for path in (Path(lctrain.__file__).parent / "configs" / "model").glob("*.yaml"))

PUBLISHED = {
    "llama3_1b": (1.236e9, 1.236e9),
    "llama3_8b": (8.030e9, 8.030e9),
    "mistral_7b": (7.242e9, 7.242e9),
    "qwen3_8b": (8.191e9, 8.191e9),
    "mamba2_hybrid_8b": (8.66e9, 8.66e9),
    "nemotron_h_8b": (8.10e9, 8.10e9),
    "mixtral_8x7b": (46.7e9, 12.9e9),
    "qwen3_30b_a3b": (30.5e9, 3.3e9),
    "deepseek_v3_like": (671e9, 37e9),
    "jamba_like": (52e9, 12e9),
    "hybridna_300m": (300e6, 300e6),
}
"""Parameters, and those active on a token: model cards and papers named in the presets."""
TOLERANCE = 0.02
"""Published figures are rounded; whether embeddings count as active differs from paper to paper."""


class Choice(Strict):
    model: ModelConfig


def preset(name: str) -> ModelConfig:
    return load(Choice, "presets", [f"model={name}"]).model


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_builds_and_knows_its_name(name: str) -> None:
    config = preset(name)
    assert config.name == name
    size = model_size(config)
    assert 0 < size.active <= size.total
    assert (size.active < size.total) == ("E" in config.pattern)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    size = model_size(preset(name))
    assert size == pytest.approx(PUBLISHED[name], rel=TOLERANCE)


def test_published_shares_of_layers() -> None:
    shares = {
        "mamba2_hybrid_8b": {"M": 24, "*": 4, "-": 28},
        "nemotron_h_8b": {"M": 24, "*": 4, "-": 24},
        "jamba_like": {"M": 28, "*": 4, "-": 16, "E": 16},
        "hybridna_300m": {"M": 21, "*": 3, "-": 24},
    }
    for name, counts in shares.items():
        assert Counter(layer.symbol for layer in parse_pattern(preset(name).pattern)) == counts, name


def test_the_tiny_hybrid_has_every_kind_of_layer_of_the_acceptance_test() -> None:
    assert {layer.symbol for layer in parse_pattern(preset("hybrid_tiny").pattern)} == set("M*W-E")
