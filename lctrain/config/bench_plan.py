"""Settings of `lctrain bench plan`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lctrain.config.strict import Positive, Strict

Case = Literal["single", "cp2", "ddp2", "fsdp2", "tp2", "pp2", "zero3"]
CASES: tuple[Case, ...] = ("single", "cp2", "ddp2", "fsdp2", "tp2", "pp2", "zero3")


class PlanBenchConfig(Strict):
    """`lctrain bench plan`: planned beside measured steps and memory of real engines on this machine."""

    model: str = "small"
    """Model preset, as in `lctrain train model=`; heads of one size."""
    seq: Positive = 2048
    """Tokens per sample."""
    cases: Annotated[tuple[Case, ...], Field(min_length=1)] = CASES
    """Layouts."""
    steps: Positive = 2
    """Measured steps of each, after one that warms up."""
    output: str | None = None
    """JSON file for the results and a description of this machine."""
