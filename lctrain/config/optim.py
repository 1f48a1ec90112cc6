"""Settings of the optimizer and of the learning rate over a run."""

from __future__ import annotations

from typing import Literal

from lctrain.config.strict import Fraction, NonNegative, NonNegativeFloat, PositiveFloat, Strict


class ScheduleConfig(Strict):
    """Learning rate over the run."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up; wsd stays flat, then falls linearly over decay_fraction of the steps."""
    warmup_steps: NonNegative = 0
    """Steps of linear rise from 0 to lr."""
    min_ratio: Fraction = 0.1
    """Final learning rate as a fraction of lr."""
    decay_fraction: Fraction = 0.2
    """wsd: fraction of the steps, at the end, over which the rate falls."""


class OptimConfig(Strict):
    """AdamW; matrices decay, vectors (norms, biases) do not."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices."""
    clip_norm: PositiveFloat | None = 1.0
    """Global gradient norm above which gradients are scaled down; null: never."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run."""
