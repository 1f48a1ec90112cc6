"""A pipeline stage: a piece of the model with the face that megatron-core's schedules and wrappers ask for."""

from __future__ import annotations

from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lctrain.models.model import LossSums
from lctrain.models.piece import Piece
from lctrain.parallel.sequence import SequenceMeta


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
