"""Settings of tools/timeline.py."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lctrain.config.cluster import ClusterConfig
from lctrain.config.schema import LayoutKind, Ring, Strategy
from lctrain.config.strict import Positive, Strict


class TimelineConfig(Strict):
    """A picture of one attention layer over the ranks of a sequence."""

    output: tuple[str, ...] = ("timeline.png",)
    """Files to write: .png, .svg or .pdf for a picture, .json for a Chrome trace (Perfetto, chrome://tracing)."""
    strategy: Strategy = "ring"
    """How attention works over the ranks."""
    ulysses: Positive | None = None
    """usp: ranks per group that exchange heads for sequence; null: the largest below cp that divides the KV heads."""
    ring: Ring = "ring"
    """usp: strategy between the groups."""
    nesting: Literal["inner", "outer"] = "inner"
    """usp: inner puts neighbouring ranks into a group, outer ranks that lie far apart."""
    node_size: Positive | None = None
    """double_ring: ranks per inner ring; null: the largest up to the square root of cp."""
    cp: Positive = 4
    """Ranks that share the sequence."""
    seq: Positive = 32768
    """Tokens."""
    batch: Positive = 1
    """Sequences side by side."""
    heads: Positive = 32
    """Query heads."""
    kv_heads: Positive | None = None
    """Key/value heads; null: as many as heads."""
    head_dim: Positive = 128
    """Size of a head."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic."""
    window: Positive | None = None
    """Tokens that a query sees, its own included; null: all earlier ones."""
    layout: LayoutKind = "zigzag"
    """Which tokens each rank owns."""
    cluster: ClusterConfig | None = None
    """What to simulate on; null: run it on this machine's CPU cores with gloo, and draw what was measured."""

    @model_validator(mode="after")
    def _check(self) -> TimelineConfig:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        wrong = [path for path in self.output if not path.endswith((".png", ".svg", ".pdf", ".json"))]
        if wrong or not self.output:
            raise ValueError(f"output={','.join(wrong) or '[]'}: name files that end in .png, .svg, .pdf or .json")
        return self
