"""Plans of a batch's attention, made ahead of the step that needs them.

Packed documents ask for new schedules in every micro-batch. To make and check them takes as long as a small step with many
ranks, so the loader's threads do it: a micro-batch brings its plans, and layers find them where they would make their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lctrain.attention_choice import attention_shapes, attention_strategies
from lctrain.config.schema import TrainConfig
from lctrain.models.latent_attention import latent_travels
from lctrain.parallel.attention import prepare_attention
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask, Borders
from lctrain.parallel.mesh import ProcessMesh
from lctrain.parallel.plan import AttentionPlan

Prepare = Callable[[SequenceLayout, tuple[Borders, ...]], tuple[AttentionPlan, ...]]
"""(layout, borders of every row's documents) of a micro-batch -> this rank's plans for all kinds of attention layers."""


def make_preparation(config: TrainConfig, mesh: ProcessMesh, device: torch.device, gradients: bool = True) -> Prepare:
    """What makes this rank's plans; without `gradients` only those of forward passes."""
    strategies, shapes = attention_strategies(config, device), attention_shapes(config)

    def prepare(layout: SequenceLayout, borders: tuple[Borders, ...]) -> tuple[AttentionPlan, ...]:
        plans: tuple[AttentionPlan, ...] = ()
        for kind, shape in shapes.items():
            mask = AttentionMask(borders, causal=True, window=kind if isinstance(kind, int) else None)
            latent = kind == "+" and latent_travels(
                config.model.latent_attention, shape.n_heads, strategies[kind], mesh.cp, layout.length, shape.dtype
            )
            heads = shape.n_heads, shape.n_kv_heads
            plans += prepare_attention(layout, mask, mesh.cp_rank, strategies[kind], *heads, latent=latent, gradients=gradients)
        return plans

    return prepare
