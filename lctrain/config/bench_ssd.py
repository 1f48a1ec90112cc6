"""Settings of `lctrain bench ssd`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lctrain.config.bench import BenchConfig, Lengths
from lctrain.config.strict import NonNegative, Positive


class SsdBenchConfig(BenchConfig):
    """`lctrain bench ssd`: the state-space scan of Mamba-2, or a whole Mamba-2 layer, forward and backward."""

    seq: Lengths = (8192, 16384, 32768, 65536)
    """Tokens per sequence; a list measures one after the other."""
    part: Literal["scan", "layer"] = "scan"
    """scan: from x, dt, A, B, C, D to y. layer: projections, convolution, scan, gated norm, projection."""
    d_model: Positive = 256
    """part=layer: width of the residual stream; the inner width is heads x head_dim."""
    heads: Positive = 8
    """Heads."""
    head_dim: Positive = 64
    """Size of a head."""
    state: Positive = 128
    """Size of B and C."""
    groups: Positive = 1
    """Groups of heads that share B and C; must divide heads."""
    chunk: Positive = 128
    """Tokens per chunk of our scan."""
    their_chunk: Positive = 256
    """Tokens per chunk of transformers' scan; 256 is its default."""
    recurrence: NonNegative = 512
    """Tokens at which the token-by-token recurrence takes part too; 0: not at all."""
    repeats: Positive = 3
    """Timed passes of each contender, after one that is not timed."""
    threads: Positive | None = None
    """CPU threads; null: all cores of this machine that the command may use."""

    @model_validator(mode="after")
    def _check(self) -> SsdBenchConfig:
        if self.heads % self.groups:
            raise ValueError(f"heads={self.heads} is not a multiple of groups={self.groups}")
        if self.part == "layer" and self.heads * self.head_dim % self.d_model:
            raise ValueError(
                f"heads={self.heads} x head_dim={self.head_dim} is not a multiple of d_model={self.d_model},"
                " which transformers' layer needs"
            )
        return self
