"""Routed heads of `*` against their formula in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lctrain.config.model import AttentionConfig, ModelConfig
from lctrain.config.moe import RoutedHeadsConfig
from lctrain.models.attention import Attention
from lctrain.verify.blocks.attention import by_formula
from lctrain.verify.blocks.compare import Case, Errors, against_oracle, decoding, packing, random_mixer

D_MODEL = 32
HEADS = {
    "2 shared": RoutedHeadsConfig(shared=2, top_k=3, balance=0.0),
    "1 shared": RoutedHeadsConfig(shared=1, top_k=2, balance=0.0),
    "none shared": RoutedHeadsConfig(shared=0, top_k=2, balance=0.0),
}


def cases() -> Iterator[Case]:
    """Every kind of head; packing; decoding."""
    for name, heads in HEADS.items():
        yield f"* routed heads, {name}", partial(_against_formula, heads)
    yield "* routed heads, packing", lambda: packing(_mixer(HEADS["2 shared"]), D_MODEL)
    yield "* routed heads, decoding", lambda: decoding(_mixer(HEADS["2 shared"]), D_MODEL)


def _mixer(heads: RoutedHeadsConfig) -> Attention:
    settings = AttentionConfig(n_heads=8, n_kv_heads=4, routed_heads=heads)
    mixer = random_mixer("*", ModelConfig(pattern="*", d_model=D_MODEL, vocab_size=8, attention=settings))
    assert isinstance(mixer, Attention)
    return mixer


def _against_formula(heads: RoutedHeadsConfig) -> Errors:
    mixer = _mixer(heads)
    return against_oracle(mixer, lambda x: weighted_by_formula(mixer, heads, x), D_MODEL)


def weighted_by_formula(mixer: Attention, heads: RoutedHeadsConfig, x: Tensor) -> Tensor:
    """Every head's way to the output by itself, times its weight."""
    x, router = x.double(), mixer.head_router
    assert router is not None
    scores = (x @ router.routed.double().t()).softmax(-1)
    chosen = scores >= scores.sort(-1, descending=True).values[..., heads.top_k - 1, None]
    weights = heads.top_k * scores * chosen / (scores * chosen).sum(-1, keepdim=True)
    if router.kinds is not None:
        kinds = 2 * (x @ router.kinds.double().t()).softmax(-1)
        always = torch.ones_like(weights[..., : heads.shared])
        if router.shared is not None:
            always = heads.shared * (x @ router.shared.double().t()).softmax(-1)
        weights = torch.cat([kinds[..., :1] * always, kinds[..., 1:] * weights], dim=-1)
    return by_formula(mixer, x, weights)
