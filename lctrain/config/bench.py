"""Settings of `lctrain bench`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from lctrain.config.model import ModelConfig
from lctrain.config.schema import LayoutKind, Strategy
from lctrain.config.strict import NonNegative, Positive, Strict

PeerName = Literal["deepspeed", "alst", "torch_ring", "torch_all_gather", "zigzag_ring", "llama3", "yunchang", "token_ring"]
Lengths = Annotated[tuple[Positive, ...], Field(min_length=1)]


class BenchConfig(Strict):
    """What all benchmarks share."""

    seq: Lengths
    """Tokens per sequence; a list measures one after the other."""
    batch: Positive = 1
    """Sequences side by side."""
    documents: Lengths = (1,)
    """Packed documents in every sequence. One number: that many, cut at random places. Several numbers: their lengths, which
    add up to seq."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic."""
    seed: NonNegative = 0
    """Seed of weights, tokens, inputs and document borders."""
    output: str | None = None
    """JSON file for the results and a description of this machine."""

    @model_validator(mode="after")
    def _check_documents(self) -> BenchConfig:
        for seq in self.seq:
            if len(self.documents) == 1 and self.documents[0] > seq:
                raise ValueError(f"documents={self.documents[0]} do not fit in seq={seq} tokens: ask for fewer")
            if len(self.documents) > 1 and sum(self.documents) != seq:
                raise ValueError(f"the lengths in documents add up to {sum(self.documents)}, not to seq={seq}")
        return self


class StepBenchConfig(BenchConfig):
    """`lctrain bench step`: whole optimizer steps."""

    model: ModelConfig
    """The network."""
    seq: Lengths = (1024, 4096)
    """Tokens per sequence; a list measures one after the other."""
    steps: Positive = 5
    """Timed optimizer steps of each contender, after one that is not timed."""
    threads: Positive | None = None
    """CPU threads; null: all cores of this machine that the command may use."""
    activation_checkpointing: Literal["none", "layer"] = "none"
    """layer: keep each layer's input only and recompute the rest in backward."""


class AttentionBenchConfig(BenchConfig):
    """`lctrain bench attention`: sequence-parallel attention, forward and backward."""

    seq: Lengths = (8192,)
    """Tokens per sequence; a list measures one after the other."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = ("ring", "all_gather")
    """Ways in which keys and values reach the queries."""
    cp: Lengths = (2, 4)
    """Numbers of processes that share a sequence."""
    heads: Positive = 8
    """Query heads."""
    kv_heads: Positive | None = None
    """Key/value heads; must divide heads; null: as many as heads."""
    head_dim: Positive = 64
    """Size of a head."""
    layout: LayoutKind = "zigzag"
    """Which tokens each process owns."""
    window: Positive | None = None
    """Tokens that a query sees, its own included; null: all earlier ones of its document."""
    repeats: Positive = 3
    """Timed passes of each contender, after one that is not timed."""

    @model_validator(mode="after")
    def _check(self) -> AttentionBenchConfig:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        return self


class PeersBenchConfig(Strict):
    """`lctrain bench attention --peers`: our strategies beside other libraries' on one causal document."""

    seq: Lengths = (8192,)
    """Tokens per sequence; a list measures one after the other."""
    cp: Lengths = (2, 4)
    """Numbers of processes that share a sequence."""
    heads: Positive = 8
    """Query heads."""
    kv_heads: Lengths = (8, 2)
    """Key/value heads, which must divide heads; a list measures one after the other."""
    head_dim: Positive = 64
    """Size of a head."""
    dtypes: Annotated[tuple[Literal["fp32", "bf16"], ...], Field(min_length=1)] = ("fp32", "bf16")
    """Arithmetic; a list measures one after the other."""
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = ("ring", "all_gather", "token_ring", "ulysses", "usp")
    """Ours, with zigzag shards."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Others'. What is not installed is listed with the command that installs it."""
    repeats: Positive = 2
    """Timed passes of each contender, after one that is not timed, in which bytes are counted and results compared."""
    seed: NonNegative = 0
    """Seed of the inputs."""
    output: str | None = None
    """JSON file for the results and a description of this machine."""

    @model_validator(mode="after")
    def _check(self) -> PeersBenchConfig:
        for kv_heads in self.kv_heads:
            if self.heads % kv_heads:
                raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={kv_heads}")
        return self

    def problems(self) -> Iterator[AttentionBenchConfig]:
        """One after the other."""
        for seq, kv_heads, dtype in itertools.product(self.seq, self.kv_heads, self.dtypes):
            yield AttentionBenchConfig(
                seq=(seq,), heads=self.heads, kv_heads=kv_heads, head_dim=self.head_dim, dtype=dtype, seed=self.seed
            )
