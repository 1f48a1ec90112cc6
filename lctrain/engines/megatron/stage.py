"""A pipeline stage: a run of the model's sublayers, and the face that megatron-core's schedules and wrappers ask for."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lctrain.config.schema import ModelConfig
from lctrain.models.model import LanguageModel, LossSums
from lctrain.models.parallel import ModelParallel
from lctrain.parallel.sequence import SequenceMeta


class Piece(LanguageModel):
    """Some consecutive sublayers of a LanguageModel under their names in the whole, with the embedding or the head at its ends.

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


class Stage(nn.Module):
    """What megatron-core calls a model chunk. Activations travel between stages as they are, [B, S, d_model]."""

    def __init__(self, config: TransformerConfig, piece: Piece, index: int | None, loss_chunk: int, z_weight: float) -> None:
        super().__init__()
        self.config, self.piece, self.vp_stage = config, piece, index
        self.loss_chunk, self.z_weight = loss_chunk, z_weight
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = piece.first, piece.last
        self.share_embeddings_and_output_weights = piece.config.tie_embeddings
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """What the stage before has sent; None for the first."""
        self.received = tensors[0]

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied embedding, whose gradients megatron sums over the first and the last stage."""
        return self.piece.embedding

    def forward(self, tokens: Tensor, labels: Tensor, seq: SequenceMeta) -> Tensor | LossSums:
        """tokens, labels: int64 [B, T]. Returns what the next stage receives, or on the last one the loss."""
        x = self.piece.embed(tokens) if self.piece.first else self.received
        assert x is not None
        x = self.piece.run(x, seq)
        return self.piece.loss(x, labels, seq, self.loss_chunk, self.z_weight) if self.piece.last else x.contiguous()
