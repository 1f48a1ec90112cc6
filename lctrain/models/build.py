"""From a run's config to its model."""

from __future__ import annotations

import torch

from lctrain.config.schema import TrainConfig
from lctrain.devices import DTYPES
from lctrain.models.model import LanguageModel
from lctrain.models.parallel import ModelParallel


def build_model(config: TrainConfig, parallel: ModelParallel | None = None) -> LanguageModel:
    """The model, or this rank's part of it, without storage (meta device): sharding can come before any memory is taken."""
    with torch.device("meta"):
        checkpointing = config.engine.activation_checkpointing == "layer"
        return LanguageModel(config.model, DTYPES[config.engine.dtype], checkpointing, parallel)
