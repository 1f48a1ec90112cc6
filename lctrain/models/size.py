"""How many parameters a model has, and how many of them work on a token."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lctrain.config.model import ModelConfig
from lctrain.models.model import LanguageModel
from lctrain.models.place import Family, parameter_places


class Size(NamedTuple):
    """Parameters in all, and those that one token meets: of the routed experts only its own."""

    total: int
    active: int


def model_size(config: ModelConfig) -> Size:
    """Counted on the model itself, built without storage. Tied embeddings count once."""
    with torch.device("meta"):
        model = LanguageModel(config)
    places = parameter_places(model)
    total = active = 0
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        total += count
        active += count * config.moe.top_k // config.moe.n_experts if places[name].family is Family.EXPERT else count
    return Size(total, active)
