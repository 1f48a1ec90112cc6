"""Settings of rotary position embedding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lctrain.config.strict import Fraction, NonNegativeFloat, Positive, PositiveFloat, Strict


class RopeConfig(Strict):
    """Rotary position embedding and how it is stretched to longer context."""

    theta: PositiveFloat = 10_000.0
    """Base of the rotation frequencies."""
    fraction: Annotated[Fraction, Field(gt=0)] = 1.0
    """Share of a head's entries that is rotated (Bamba: 0.5): pairs i and i + head_dim / 2, of which the last stay."""
    scaling: Literal["none", "linear", "yarn", "llama3"] = "none"
    """Rule that stretches the frequencies: none, linear (position interpolation), yarn, or llama3 (by-part smoothing)."""
    factor: PositiveFloat = 1.0
    """Ratio of the wanted context to the original one; used by every rule but `none`."""
    original_max_position: Positive = 8192
    """Context length, in tokens, of the model before stretching (yarn, llama3)."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths longer than original_max_position / this are stretched fully."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths shorter than original_max_position / this are left alone."""
    beta_fast: PositiveFloat = 32.0
    """yarn: rotations over the original context above which a frequency is left alone."""
    beta_slow: PositiveFloat = 1.0
    """yarn: rotations over the original context below which a frequency is stretched fully."""
    mscale: NonNegativeFloat = 1.0
    """yarn: cos and sin are multiplied by t(mscale) / t(mscale_all_dim), where t(m) = 0.1 m ln(factor) + 1."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """yarn, as DeepSeek uses it: scores of latent attention are multiplied by t(mscale_all_dim) squared."""

    @model_validator(mode="after")
    def _check(self) -> RopeConfig:
        if self.scaling == "none" and self.factor != 1.0:
            raise ValueError(f"factor={self.factor} has no effect with scaling=none; choose linear, yarn or llama3")
        if self.fraction < 1 and self.scaling == "yarn":
            raise ValueError(f"fraction={self.fraction} does not go with scaling=yarn; choose linear or llama3")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}")
        return self
