"""A tiny model folder of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from tests import conversion

LLAMA = ModelConfig(
    pattern="(*-){2}",
    d_model=32,
    vocab_size=320,
    norm_eps=1e-6,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2),
    mlp=MlpConfig(d_ff=48),
)


@pytest.fixture
def make_folder(tmp_path):
    """make_folder(config, name): a model folder of ours with random values everywhere."""

    def make(config: ModelConfig = LLAMA, name: str = "ours") -> Path:
        return conversion.random_model(tmp_path / name, config)

    return make


@pytest.fixture
def run():
    """run(setting=value, ...): a conversion."""
    return conversion.run
