"""Which module stands behind each symbol of a pattern.

A mixer is an nn.Module built from the model config, with
    forward(x, seq) -> x        training, over a sequence that may be spread over ranks
    new_state(), decode(x, s)   generation, token after token, on one process
    flops(documents)            exact forward cost
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lctrain.config.schema import ModelConfig
from lctrain.models.attention import Attention
from lctrain.models.mlp import Mlp
from lctrain.models.pattern import SYMBOLS, LayerSpec

TOKEN_MIXERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "*": lambda config: Attention(config, windowed=False),
    "W": lambda config: Attention(config, windowed=True),
}
"""Mixers that move information between tokens."""

CHANNEL_MIXERS: dict[str, Callable[[ModelConfig], nn.Module]] = {"-": Mlp}
"""Mixers that work on each token by itself."""

assert set(SYMBOLS) == set(TOKEN_MIXERS) | set(CHANNEL_MIXERS)


def build_mixer(spec: LayerSpec, config: ModelConfig) -> nn.Module:
    """The mixer of one sublayer."""
    return {**TOKEN_MIXERS, **CHANNEL_MIXERS}[spec.symbol](config)
