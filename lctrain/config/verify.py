"""Settings of `lctrain verify`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lctrain.config.schema import LayoutKind
from lctrain.config.strict import NonNegative, Positive, Strict

MaskName = Literal["causal", "full", "window", "documents", "documents_window", "sinks"]
HeadsName = Literal["mha", "gqa", "mqa", "uneven"]
Some = Field(min_length=1)


class AttentionVerifyConfig(Strict):
    """`lctrain verify attention`: every combination of these settings, against one process."""

    strategies: Annotated[tuple[str, ...], Some] | None = None
    """Strategies (`usp` means all its degrees), or exact variants as the report names them (`usp-2-ring-outer`); null: all."""
    cp: Annotated[tuple[Positive, ...], Some] = (1, 2, 3, 4)
    """Numbers of processes that share a sequence."""
    layouts: Annotated[tuple[LayoutKind, ...], Some] = ("zigzag", "contiguous", "striped", "balanced")
    """Which tokens each process owns. Cases take them in turn unless `cross_layouts`."""
    masks: Annotated[tuple[MaskName, ...], Some] = ("causal", "full", "window", "documents", "documents_window", "sinks")
    """Who sees whom. Packed documents differ from row to row, some rows end in padding; sinks: causal, documents, learned
    sinks."""
    heads: Annotated[tuple[HeadsName, ...], Some] = ("mha", "gqa", "mqa", "uneven")
    """Query and KV heads: 4 and 4, 4 and 2, 4 and 1; uneven: 3 and 3, which 2 or 4 processes cannot share evenly."""
    lengths: Annotated[tuple[Positive, ...], Some] = (1, 7, 64, 1000)
    """Tokens per sequence."""
    dtypes: Annotated[tuple[Literal["fp32", "bf16"], ...], Some] = ("fp32", "bf16")
    """Arithmetic."""
    batch: Annotated[tuple[Positive, ...], Some] = (1, 2)
    """Sequences side by side."""
    seed: NonNegative = 0
    """Seed of inputs and document borders."""
    cross_layouts: bool = False
    """Combine every layout with every other setting: four times as many cases."""
    quick: bool = False
    """A sample that takes seconds, of at most 200 tokens per sequence."""
    output: str | None = None
    """JSON file for the report."""


class BlocksVerifyConfig(Strict):
    """`lctrain verify blocks`: every block on one process against its oracle."""

    blocks: Annotated[tuple[str, ...], Some] | None = None
    """Blocks as the report names them; null: all."""
    cases: Annotated[tuple[Positive, ...], Some] | None = None
    """Numbers of the cases of these blocks, counted from 1; null: all."""
    quick: bool = False
    """A sample of each block's cases."""
    output: str | None = None
    """JSON file for the report."""


class LayoutVerifyConfig(Strict):
    """How a layout is proved."""

    processes: Annotated[int, Field(ge=1, le=64)] = 8
    """Most processes to start; a larger layout is made smaller, dimension by dimension, and the report says how."""
    length: Annotated[int, Field(ge=16)] = 203
    """Tokens per sample: an odd number, so that shards are uneven."""
    steps: Annotated[int, Field(ge=2)] = 3
    """Optimizer steps."""
    seed: NonNegative = 0
    """Seed of weights and samples."""
    timeout_s: Positive = 300
    """Seconds a layout may take before it counts as hanging."""
    output: str | None = None
    """JSON file for the report; null: verify_layout.json in the run directory of the proved config (with --all: none)."""
    all: bool = False
    """Prove the standard matrix of layouts instead of one; the same as --all."""
    quick: bool = False
    """With --all: ten of its layouts."""
    only: str | None = None
    """With --all: layouts whose name contains this text."""


class LayoutVerifyRoot(Strict):
    """`lctrain verify layout`: its own settings beside those of `lctrain train`, which say what is proved."""

    verify: LayoutVerifyConfig = LayoutVerifyConfig()
    """How the proof is made."""
