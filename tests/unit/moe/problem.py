"""Mixtures of experts on packed rows, and what a loop over tokens and experts makes of them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.config.model import ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig, RouterConfig
from lctrain.models.moe.moe import MixtureOfExperts
from lctrain.models.parallel import ModelParallel
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions
from lctrain.parallel.sequence import SequenceMeta

D_MODEL = 16
DOCUMENTS = ((0, 7, 8, 21), (0, 17))
LENGTH = 23
"""Two rows: three documents and two positions of padding; one document and six of padding."""


def settings(router: dict | None = None, balance: dict | None = None, **fields: object) -> ModelConfig:
    """Eight small experts, two per token, the switch loss off unless asked for."""
    return ModelConfig(
        pattern="E",
        d_model=D_MODEL,
        vocab_size=11,
        moe=MoeConfig(
            **{"n_experts": 8, "top_k": 2, "d_ff": 12, **fields},
            router=RouterConfig(**(router or {})),
            balance=BalanceConfig(**{"switch": 0.0, **(balance or {})}),
        ),
    )


def make_moe(config: ModelConfig, dtype: torch.dtype = torch.float64, parallel: ModelParallel | None = None, seed: int = 0):
    """A layer of this rank's parts of random weights, and a bias that matters if there is one."""
    layer = MixtureOfExperts(config, parallel or ModelParallel())
    with torch.no_grad():
        for name, parameter in whole_weights(config, seed).items():
            layer.get_parameter(name).copy_(part(layer, name, parameter))
        if layer.balancer.bias is not None:
            layer.balancer.bias.copy_(torch.linspace(-0.3, 0.4, config.moe.n_experts))
    return layer.to(dtype)


def whole_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Random weights of the whole layer, fp64."""
    torch.manual_seed(seed)
    like = MixtureOfExperts(config, ModelParallel())
    return {name: torch.randn(p.shape, dtype=torch.float64) * 0.4 for name, p in like.named_parameters()}


def part(layer: MixtureOfExperts, name: str, whole: Tensor) -> Tensor:
    """This rank's part of a whole parameter or gradient."""
    from lctrain.models.place import parameter_places, part_of

    return part_of(whole, parameter_places(layer)[name], layer.parallel)


def sequence(
    documents=DOCUMENTS, length: int = LENGTH, layout: SequenceLayout | None = None, group: RankGroup | None = None, **kwargs
):
    """SequenceMeta of one rank."""
    layout = layout or SequenceLayout("zigzag", 1, length)
    group = group or RankGroup()
    positions = layout.shard(document_positions(documents, length), group.rank, dim=1)
    return SequenceMeta(layout, group, positions, tuple(documents), **kwargs)


def real_mask(documents=DOCUMENTS, length: int = LENGTH) -> Tensor:
    """Bool [B, length]."""
    return torch.stack([torch.arange(length) < borders[-1] for borders in documents])


def loop(layer: MixtureOfExperts, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Routed experts' outputs for x [n, d], one by one; experts, weights [n, k]; -1: dropped."""
    rows = []
    for token, chosen, shares in zip(x, experts.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, share in zip(chosen, shares, strict=True):
            if expert >= 0:
                total = total + share * one_expert(layer, expert, token)
        rows.append(total)
    return torch.stack(rows)


def one_expert(layer: MixtureOfExperts, expert: int, x: Tensor) -> Tensor:
    """One expert's output."""
    experts = layer.experts
    up = experts.up[expert] @ x
    if experts.gate is not None:
        gate = experts.gate[expert] @ x
        return experts.down[expert] @ (gate * torch.sigmoid(gate) * up)
    return experts.down[expert] @ (F.gelu(up, approximate="tanh") if experts.activation == "gelu" else up.clamp(min=0) ** 2)


def documents_of(documents=DOCUMENTS) -> list[tuple[int, int, int]]:
    """(row, start, end) of every document."""
    return [(row, a, b) for row, borders in enumerate(documents) for a, b in itertools.pairwise(borders)]
