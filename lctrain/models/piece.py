"""A piece of a language model for a pipeline stage: a run of its sublayers, with the embedding or the head at its ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lctrain.config.model import ModelConfig
from lctrain.config.schema import TrainConfig
from lctrain.models.cuts import stage_layers
from lctrain.models.model import LanguageModel
from lctrain.models.parallel import ModelParallel


class Piece(LanguageModel):
    """Some consecutive sublayers of a LanguageModel under their names in the whole, on the meta device.

    A tied embedding stands in the first and in the last piece.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, checkpointing: bool, parallel: ModelParallel, layers: range
    ) -> None:
        with torch.device("meta"):
            super().__init__(config, dtype, checkpointing, parallel)
        self._depth = len(self.layers)
        self.first, self.last = layers.start == 0, layers.stop == self._depth
        self.layers = _Layers({str(place): self.layers[place] for place in layers})  # type: ignore[assignment]
        if not self.first and not (self.last and config.tie_embeddings):
            del self.embedding
        if not self.last:
            del self.norm, self.head

    @property
    def depth(self) -> int:
        """Sublayers of the whole model."""
        return self._depth


class _Layers(nn.ModuleDict):
    """Named by their place in the whole model; iterated like a list."""

    def __iter__(self) -> Any:
        return iter(self.values())


def piece_ranges(config: TrainConfig, model: LanguageModel, pieces: int) -> list[range]:
    """Places of the sublayers of each piece, cut by the pattern or by cost (see stage_layers). model: the whole."""
    length = config.trainer.seq_len
    documents = ((0, length),)
    costs = [layer.mixer.flops(documents) for layer in model.layers]
    return stage_layers(config.model, pieces, costs, 2.0 * length * model.output_weight.numel())
