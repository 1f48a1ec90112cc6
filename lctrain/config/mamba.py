"""Settings of the recurrent mixers: Mamba-2, the symbol `M`, and linear attention with constant decay, the symbol `L`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lctrain.config.strict import NonNegativeFloat, Positive, PositiveFloat, Strict


class MambaConfig(Strict):
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060)."""

    d_inner: Positive | None = None
    """Width of x and of its gate z; null means 2 x d_model."""
    head_dim: Positive = 64
    """Size of a head; there are d_inner / head_dim of them."""
    d_state: Positive = 128
    """Size of B and C: a head's state has head_dim x d_state numbers."""
    n_groups: Positive = 1
    """Groups of heads that share B and C, and over each of which the gated norm runs; must divide the number of heads."""
    conv_kernel: Positive = 4
    """Tokens that the causal convolution over x, B and C sees, the current one included."""
    conv_bias: bool = True
    """Bias of the convolution."""
    bias: bool = False
    """Bias on the projections into and out of the layer."""
    dt_min: PositiveFloat = 1e-3
    """Smallest step size at initialisation, where steps are drawn log-uniformly."""
    dt_max: PositiveFloat = 0.1
    """Largest step size at initialisation."""
    dt_limit_min: NonNegativeFloat = 0.0
    """Step sizes below this are raised to it."""
    dt_limit_max: PositiveFloat | None = None
    """Step sizes above this are lowered to it; null: no limit."""
    a_min: PositiveFloat = 1.0
    """Smallest -A at initialisation, where it is drawn uniformly."""
    a_max: PositiveFloat = 16.0
    """Largest -A at initialisation."""
    chunk: Positive = 128
    """Tokens per chunk of the scan. Results do not depend on it beyond rounding; speed and memory do."""

    @model_validator(mode="after")
    def _check(self) -> MambaConfig:
        if self.conv_kernel < 2:
            raise ValueError(f"model.mamba.conv_kernel={self.conv_kernel} sees no earlier token: use 2 or more (Mamba-2 has 4)")
        limit = self.dt_limit_max
        for low, high, name in (
            (self.dt_min, self.dt_max, "model.mamba.dt_min={} must not exceed model.mamba.dt_max={}"),
            (self.a_min, self.a_max, "model.mamba.a_min={} must not exceed model.mamba.a_max={}"),
            (self.dt_limit_min, limit, "model.mamba.dt_limit_min={} must not exceed model.mamba.dt_limit_max={}"),
        ):
            if high is not None and low > high:
                raise ValueError(name.format(low, high))
        return self

    def width(self, d_model: int) -> int:
        """d_inner of a model."""
        return self.d_inner or 2 * d_model

    def check_model(self, d_model: int) -> None:
        """ValueError if heads and groups do not divide."""
        width = self.width(d_model)
        whose = f"model.mamba.d_inner={width}" if self.d_inner else f"model.mamba.d_inner={width} (2 x model.d_model)"
        if width % self.head_dim:
            raise ValueError(f"{whose} is not a multiple of model.mamba.head_dim={self.head_dim}")
        heads = width // self.head_dim
        if heads % self.n_groups:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise ValueError(
                f"model.mamba.n_groups={self.n_groups} does not divide the {heads} heads"
                f" (model.mamba.d_inner / model.mamba.head_dim); it can be {', '.join(map(str, fits))}"
            )


class LinearAttentionConfig(Strict):
    """Linear attention whose heads forget at a constant rate each (Lightning Attention-2, arXiv 2401.04658; RetNet)."""

    n_heads: Positive = 4
    """Heads; head h = 1, 2, ... keeps exp(-2^(-8 h / n_heads)) of its state per token."""
    head_dim: Positive | None = None
    """Size of a head; null means d_model / n_heads."""
    activation: Literal["silu", "none"] = "silu"
    """What queries, keys and values pass through (MiniMax-01: silu)."""
    norm: Literal["head", "whole"] = "head"
    """RMSNorm of the outputs: over each head (RetNet), or over all heads together (MiniMax-01), which tensor-parallel ranks
    cannot divide."""
    slower_with_depth: bool = False
    """Multiply the rates by 1 - l / (n - 1) + 1e-5 in the l-th of n sublayers that mix tokens, counted from 0 (MiniMax-01)."""
    chunk: Positive = 128
    """Tokens per chunk of the scan. Results do not depend on it beyond rounding; speed and memory do."""

    def check_model(self, d_model: int) -> None:
        """ValueError if heads do not divide."""
        if self.head_dim is None and d_model % self.n_heads:
            raise ValueError(
                f"model.d_model={d_model} is not a multiple of model.linear_attention.n_heads={self.n_heads};"
                " set model.linear_attention.head_dim or change one of them"
            )

    def check_run(self, tp: int) -> None:
        """ValueError if the norm cannot be divided over tensor-parallel ranks."""
        if tp > 1 and self.norm == "whole":
            raise ValueError(
                "model.linear_attention.norm=whole needs all heads on one rank:"
                f" set model.linear_attention.norm=head, or parallel.tp=1 instead of {tp}"
            )


def check_layout(symbols: set[str], layout: str, cp: int) -> None:
    """ValueError if recurrent layers meet a layout without consecutive tokens."""
    recurrent = sorted(symbols & {"M", "L"})
    if recurrent and cp > 1 and layout == "striped":
        raise ValueError(
            f"parallel.layout=striped leaves no two consecutive tokens on a rank, which {' and '.join(recurrent)} layers need:"
            " choose zigzag, contiguous or balanced"
        )
