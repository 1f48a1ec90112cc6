"""Settings of `lctrain bench moe`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lctrain.config.bench import BenchConfig, Lengths
from lctrain.config.strict import Positive


class MoeBenchConfig(BenchConfig):
    """`lctrain bench moe`: a mixture of experts, forward and backward."""

    seq: Lengths = (8192,)
    """Tokens per sequence; a list measures one after the other."""
    part: Literal["experts", "layer"] = "experts"
    """experts: from rows in the order of experts to their outputs. layer: router, permutation, experts, weighted sum."""
    experts: Lengths = (8, 64)
    """Numbers of experts; a list measures one after the other."""
    top_k: Positive = 2
    """Experts per token."""
    d_model: Positive = 256
    """Width of the residual stream."""
    d_ff: Positive = 512
    """Hidden width of an expert."""
    repeats: Positive = 3
    """Timed passes of each contender, after one that is not timed."""
    threads: Positive | None = None
    """CPU threads; null: all cores of this machine that the command may use."""

    @model_validator(mode="after")
    def _check(self) -> MoeBenchConfig:
        if self.top_k > min(self.experts):
            raise ValueError(f"top_k={self.top_k} exceeds experts={min(self.experts)}")
        return self
