"""Which module stands behind each symbol of a pattern."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lctrain.config.model import ModelConfig
from lctrain.models.attention import Attention
from lctrain.models.latent_attention import LatentAttention
from lctrain.models.linear_attention import LinearAttention
from lctrain.models.mamba import Mamba2
from lctrain.models.mlp import Mlp
from lctrain.models.moe.moe import MixtureOfExperts
from lctrain.models.parallel import ModelParallel
from lctrain.models.pattern import SYMBOLS, LayerSpec, parse_pattern
from lctrain.parallel.mask import Borders
from lctrain.parallel.sequence import SequenceMeta


class Mixer(Protocol):
    """What a sublayer holds, besides being an nn.Module."""

    def __call__(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, T, d_model] -> same shape; T is this rank's share of the sequence that `seq` describes."""

    def new_state(self) -> Any:
        """Empty state for `decode`; None for a mixer without one."""

    def decode(self, x: Tensor, state: Any) -> Tensor:
        """The newest tokens x [B, S, d_model] of one document, given the state after the earlier ones, which it updates."""

    def flops(self, documents: tuple[Borders, ...]) -> int:
        """Multiply-adds x 2 of one forward pass over whole sequences with these documents."""


TOKEN_MIXERS: dict[str, Callable[[ModelConfig, ModelParallel], Mixer]] = {
    "*": lambda config, parallel: Attention(config, False, parallel),
    "W": lambda config, parallel: Attention(config, True, parallel),
    "+": LatentAttention,
    "M": Mamba2,
    "L": LinearAttention,
}
"""Mixers that move information between tokens."""

CHANNEL_MIXERS: dict[str, Callable[[ModelConfig, ModelParallel], Mixer]] = {"-": Mlp, "E": MixtureOfExperts}
"""Mixers that work on each token by itself."""

assert set(SYMBOLS) == set(TOKEN_MIXERS) | set(CHANNEL_MIXERS)


def build_mixer(spec: LayerSpec, config: ModelConfig, parallel: ModelParallel) -> Mixer:
    """This rank's part of the mixer of one sublayer."""
    if spec.symbol == "L":  # its rates may depend on how deep it lies
        places = [layer.place for layer in parse_pattern(config.pattern) if layer.symbol in TOKEN_MIXERS]
        return LinearAttention(config, parallel, (places.index(spec.place), len(places)))
    return {**TOKEN_MIXERS, **CHANNEL_MIXERS}[spec.symbol](config, parallel)
