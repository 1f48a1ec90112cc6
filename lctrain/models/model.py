"""The language model: embedding, a stack of residual sublayers named by the pattern, norm, loss."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lctrain.config.model import ModelConfig
from lctrain.models.layers import RMSNorm
from lctrain.models.loss import linear_cross_entropy
from lctrain.models.parallel import ModelParallel
from lctrain.models.pattern import LayerSpec, parse_pattern
from lctrain.models.place import Place
from lctrain.models.registry import Mixer, build_mixer
from lctrain.models.tensor_parallel import OutputProjection, Vocabulary, embed, gather_tokens
from lctrain.models.watch import Watch
from lctrain.parallel.mask import Borders
from lctrain.parallel.sequence import SequenceMeta


class LossSums(NamedTuple):
    """Sums over this rank's targets: the objective (with gradient), the cross-entropy alone, and each token's loss [B, T]."""

    objective: Tensor
    cross_entropy: Tensor
    per_token: Tensor


class Sublayer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, parallel: ModelParallel) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps, parallel)
        self.mixer: Mixer = build_mixer(spec, config, parallel)

    def forward(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, S, d_model] -> same shape; S is T, divided by tensor-parallel ranks (see tensor_parallel)."""
        return x + self.mixer(self.norm(x), seq)

    def decode(self, x: Tensor, state: object) -> Tensor:
        """As forward, for the newest tokens of one document."""
        return x + self.mixer.decode(self.norm(x), state)


class LanguageModel(nn.Module):
    """A decoder. Weights are fp32; layers compute in `dtype`; the loss is fp32.

    Args:
        checkpointing: keep only each sublayer's input and recompute the rest in backward.
        parallel: the ranks over which matrices are cut; this object holds its rank's part of each.

    watch: notes losses and times of training passes, if set.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
        parallel: ModelParallel | None = None,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.checkpointing = config, dtype, checkpointing
        self.parallel = parallel or ModelParallel()
        self.watch: Watch | None = None
        self.vocabulary = Vocabulary(self.parallel, config.vocab_size)
        self.embedding = nn.Parameter(torch.empty(len(self.vocabulary.ids), config.d_model))
        self.layers: Sequence[Sublayer] = nn.ModuleList(  # type: ignore[assignment]
            Sublayer(spec, config, self.parallel) for spec in parse_pattern(config.pattern)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps, self.parallel)
        self.head = None if config.tie_embeddings else OutputProjection(self.vocabulary, config.d_model)

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {"embedding": self.vocabulary.place}

    @property
    def depth(self) -> int:
        """Sublayers of the whole model."""
        return len(self.layers)

    @property
    def output_weight(self) -> Tensor:
        """[tp rank's share of vocab_size, d_model]: the head's matrix, or the embedding if they are tied."""
        return self.embedding if self.head is None else self.head.weight

    def forward(
        self, tokens: Tensor, labels: Tensor, seq: SequenceMeta, loss_chunk: int = 1024, z_weight: float = 0.0
    ) -> LossSums:
        """tokens, labels: int64 [B, T], this rank's shard. See linear_cross_entropy for the rest."""
        return self.loss(self.run(self.embed(tokens), seq), labels, seq, loss_chunk, z_weight)

    def hidden(self, tokens: Tensor, seq: SequenceMeta) -> Tensor:
        """Normed last hidden states, [B, T, d_model]."""
        return self.normed(self.run(self.embed(tokens), seq), seq)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> [B, S, d_model]."""
        return embed(self.parallel, tokens, self.embedding, self.vocabulary.ids, self.dtype)

    def run(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """All sublayers, [B, S, d_model] -> same shape."""
        trains = torch.is_grad_enabled()
        with self.watch.forward() if self.watch and trains else contextlib.nullcontext():
            for layer in self.layers:
                x = self.through(layer, x, seq)
        return x

    def through(self, layer: Sublayer, x: Tensor, seq: SequenceMeta) -> Tensor:
        """One of the sublayers, [B, S, d_model] -> same shape."""
        if self.checkpointing and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(layer, x, seq, use_reentrant=False, preserve_rng_state=False)
            return recomputed
        return layer(x, seq)

    def normed(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """The last norm, [B, S, d_model] -> [B, T, d_model]."""
        return gather_tokens(self.parallel, self.norm(x), seq)

    def loss(self, x: Tensor, labels: Tensor, seq: SequenceMeta, loss_chunk: int, z_weight: float) -> LossSums:
        """Last norm, output projection and loss of x [B, S, d_model]."""
        hidden = self.normed(x, seq)
        objective, cross_entropy, losses = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.output_weight,
            labels.flatten(),
            loss_chunk,
            z_weight,
            self.parallel.tp,
            self.vocabulary.ids.start,
        )
        if self.watch and torch.is_grad_enabled() and self.parallel.tp.rank == 0:  # all tp ranks have the same
            self.watch.losses(losses, labels, seq.positions)
        return LossSums(objective, cross_entropy, losses.view_as(labels))

    def new_state(self) -> list[object]:
        """State for `decode`, one entry per sublayer."""
        return [layer.mixer.new_state() for layer in self.layers]

    @torch.no_grad()
    def decode(self, tokens: Tensor, state: list[object]) -> Tensor:
        """fp32 logits [B, vocab_size] after the newest tokens [B, S] of one document; updates the state."""
        x = self.embed(tokens)
        for layer, memory in zip(self.layers, state, strict=True):
            x = layer.decode(x, memory)
        return self.norm(x[:, -1]).float() @ self.output_weight.float().t()

    def flops(self, documents: tuple[Borders, ...]) -> int:
        """Multiply-adds x 2 of one forward pass over whole sequences with these documents; backward costs twice that."""
        tokens = sum(borders[-1] for borders in documents)
        return sum(layer.mixer.flops(documents) for layer in self.layers) + 2 * tokens * self.output_weight.numel()
