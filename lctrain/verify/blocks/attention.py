"""`*` and `W` against the textbook formula in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.config.model import AttentionConfig, ModelConfig
from lctrain.config.rope import RopeConfig
from lctrain.kernels.attention import reference
from lctrain.models.attention import Attention
from lctrain.models.layers import RMSNorm
from lctrain.models.rope import rotation
from lctrain.parallel.mask import AttentionMask
from lctrain.verify.blocks.compare import (
    DOCUMENTS,
    LENGTH,
    Case,
    Errors,
    against_oracle,
    decoding,
    packed,
    packing,
    random_mixer,
)

D_MODEL = 32
SETTINGS: dict[str, dict[str, object]] = {
    "grouped": {},
    "one key head": {"n_kv_heads": 1},
    "qk_norm": {"qk_norm": True},
    "bias": {"bias": True, "out_bias": True},
    "sinks": {"sinks": True},
    "yarn": {"rope": RopeConfig(scaling="yarn", factor=4.0, original_max_position=16)},
    "no positions": {"rotary": False},
}


def cases() -> Iterator[Case]:
    """Every kind of layer in every setting; packing; decoding."""
    for symbol in "*W":
        for name, settings in SETTINGS.items():
            mixer = partial(_mixer, symbol, **settings)
            yield f"{symbol} formula, {name}", partial(_against_formula, mixer)
        yield f"{symbol} packing", lambda symbol=symbol: packing(_mixer(symbol, qk_norm=True, sinks=True), D_MODEL)  # type: ignore[misc]
        yield f"{symbol} decoding", lambda symbol=symbol: decoding(_mixer(symbol, sinks=True), D_MODEL)  # type: ignore[misc]


def _mixer(symbol: str, **settings: object) -> Attention:
    attention = AttentionConfig(**{"n_heads": 4, "n_kv_heads": 2, "window": 6, **settings})  # type: ignore[arg-type]
    mixer = random_mixer(symbol, ModelConfig(pattern=symbol, d_model=D_MODEL, vocab_size=8, attention=attention))
    assert isinstance(mixer, Attention)
    return mixer


def _against_formula(make: partial[Attention]) -> Errors:
    mixer = make()
    return against_oracle(mixer, lambda x: by_formula(mixer, x), D_MODEL)


def by_formula(mixer: Attention, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Attention of packed rows as written in the textbook, fp64; each head's output times its weight [B, T, H]."""
    x = x.double()
    q, k, v = (_linear(module, x).unflatten(-1, (-1, mixer.head_dim)) for module in (mixer.q, mixer.k, mixer.v))
    if mixer.q_norm is not None and mixer.k_norm is not None:
        q, k = (_rms(t, norm) for t, norm in ((q, mixer.q_norm), (k, mixer.k_norm)))
    if mixer.rotary:
        cos, sin = (t.double() for t in rotation(mixer.rope, mixer.head_dim, packed().positions))
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    out, lse = reference.attention(q, k, v, AttentionMask(DOCUMENTS, window=mixer.window).live(LENGTH))
    if mixer.sinks is not None:  # one more key with this score and the value 0
        out = out * torch.sigmoid(lse - mixer.sinks.double()[:, None]).transpose(1, 2).unsqueeze(-1)
    if weights is not None:
        out = out * weights.unsqueeze(-1)
    return _linear(mixer.out, out.flatten(2))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves against each other."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _linear(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.weight.double(), None if module.bias is None else module.bias.double())


def _rms(x: Tensor, norm: RMSNorm) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
