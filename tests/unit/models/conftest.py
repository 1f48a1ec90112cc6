"""Small models and packed sequences on one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions
from lctrain.parallel.sequence import SequenceMeta


@pytest.fixture
def model_config() -> Callable[..., ModelConfig]:
    """model_config(pattern, attention={...}, mlp={...}, ...): two KV heads for four query heads unless asked otherwise."""

    def make(pattern: str = "*-", attention: dict | None = None, mlp: dict | None = None, **fields: object) -> ModelConfig:
        return ModelConfig(
            pattern=pattern,
            attention=AttentionConfig(**{"n_heads": 4, "n_kv_heads": 2, "window": 6, **(attention or {})}),
            mlp=MlpConfig(**{"d_ff": 48, **(mlp or {})}),
            **{"d_model": 32, "vocab_size": 61, **fields},
        )

    return make


@pytest.fixture
def make_model(model_config) -> Callable[..., LanguageModel]:
    """make_model(pattern, dtype=, checkpointing=, seed=, fields of model_config): initialised, all weights perturbed.

    The perturbation gives biases and norms values of their own, so that a mistake with one of them shows.
    """

    def make(
        pattern: str = "*-", dtype: torch.dtype = torch.float32, checkpointing: bool = False, seed: int = 0, **fields: object
    ) -> LanguageModel:
        model = LanguageModel(model_config(pattern, **fields), dtype, checkpointing)
        initialise(model, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model.double() if dtype == torch.float64 else model

    return make


@pytest.fixture
def make_seq() -> Callable[..., SequenceMeta]:
    """make_seq(documents, length): the whole of some packed rows."""

    def make(documents: Sequence[tuple[int, ...]], length: int | None = None) -> SequenceMeta:
        length = length or max(borders[-1] for borders in documents)
        layout = SequenceLayout("zigzag", 1, length)
        return SequenceMeta(layout, RankGroup(), document_positions(documents, length), tuple(documents), "ring")

    return make
