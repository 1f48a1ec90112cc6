"""Settings of `lctrain sample`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lctrain.config.strict import Fraction, NonNegative, NonNegativeFloat, Positive, Strict


class SampleConfig(Strict):
    """`lctrain sample`: text from a trained model."""

    run: str
    """Run directory of `lctrain train`, a model folder of `lctrain convert`, or a Hugging Face model."""
    prompt: str = ""
    """Text to continue; empty: begin a new document."""
    checkpoint: str | None = None
    """Checkpoint folder; null: the newest whole one of the run."""
    tokens: Positive = 300
    """Most tokens to generate; generation also ends with the document."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: NonNegative = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: Annotated[Fraction, Field(gt=0)] = 1.0
    """Draw from the smallest set of likeliest tokens that holds this share of the probability."""
    samples: Positive = 1
    """Texts to generate, one after the other."""
    task: NonNegative = 0
    """Whose gate a model with model.moe.router.tasks uses: the place of a corpus in the run's data.corpora."""
    seed: NonNegative = 0
    """Seed of the draws."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one."""
