"""Settings of `lctrain bench simulate`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lctrain.config.bench import AttentionBenchConfig, Lengths
from lctrain.config.schema import Strategy


class SimulateBenchConfig(AttentionBenchConfig):
    """`lctrain bench simulate`: simulated beside measured time of sequence-parallel attention on this machine."""

    seq: Lengths = (4096, 8192)
    """Tokens per sequence; a list measures one after the other."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = (
        "ring",
        "bidirectional_ring",
        "double_ring",
        "token_ring",
        "all_gather",
        "ulysses",
        "usp",
    )
    """Strategies to simulate and to measure."""
