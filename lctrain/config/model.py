"""Settings of a model: the pattern of its sublayers, and attention and MLP, which every family has."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.mamba import LinearAttentionConfig, MambaConfig
from lctrain.config.moe import MoeConfig, RoutedHeadsConfig
from lctrain.config.rope import RopeConfig
from lctrain.config.strict import Positive, PositiveFloat, Strict


class AttentionConfig(Strict):
    """Grouped-query attention, the symbols `*` (full) and `W` (sliding window)."""

    n_heads: Positive = 4
    """Query heads."""
    n_kv_heads: Positive = 4
    """Key/value heads; must divide n_heads. 1 is multi-query attention."""
    head_dim: Positive | None = None
    """Size of a head; null means d_model / n_heads."""
    bias: bool = False
    """Bias on the query, key and value projections."""
    out_bias: bool = False
    """Bias on the output projection."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before rotation (Qwen3)."""
    sinks: bool = False
    """A learned score per head that takes part in the softmax and has no value (attention sinks, as in GPT-OSS)."""
    window: Positive | None = None
    """Tokens a `W` layer sees, the current one included; required if the pattern has a `W`."""
    rotary: bool = True
    """False: no position embedding, for models whose recurrent layers tell the order (NemotronH, Jamba)."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding."""
    routed_heads: RoutedHeadsConfig | None = None
    """Mixture of heads in `*` and `W`: each token uses some of the query heads; null: all."""


class MlpConfig(Strict):
    """Feed-forward network, the symbol `-`."""

    d_ff: Positive = 512
    """Hidden width."""
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """swiglu has a gate (three matrices); gelu (tanh form) and relu2 (squared ReLU) have two."""
    bias: bool = False
    """Bias on all projections."""


class ModelConfig(Strict):
    """A model is a pattern string of residual sublayers, plus the settings of each symbol."""

    name: str = "custom"
    """Name of the preset, for people."""
    pattern: str
    """One symbol per sublayer: `*` attention, `W` windowed attention, `+` latent attention, `M` Mamba-2, `L` linear attention,
    `-` MLP, `E` experts; repeats as in `(*-){12}`."""
    d_model: Positive
    """Width of the residual stream."""
    vocab_size: Positive
    """Rows of the embedding; token ids must lie below it."""
    attention: AttentionConfig = AttentionConfig()
    """Settings of `*` and `W`."""
    mlp: MlpConfig = MlpConfig()
    """Settings of `-`."""
    latent_attention: LatentAttentionConfig = LatentAttentionConfig()
    """Settings of `+`."""
    mamba: MambaConfig = MambaConfig()
    """Settings of `M`."""
    linear_attention: LinearAttentionConfig = LinearAttentionConfig()
    """Settings of `L`."""
    moe: MoeConfig = MoeConfig()
    """Settings of `E`."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output projection too."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections into the residual stream get it divided by sqrt(sublayers)."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        from lctrain.models.pattern import parse_pattern

        symbols = {layer.symbol for layer in parse_pattern(self.pattern)}
        attention = self.attention
        if symbols & {"*", "W"}:
            if attention.n_heads % attention.n_kv_heads:
                raise ValueError(
                    f"model.attention.n_heads={attention.n_heads} is not a multiple of"
                    f" model.attention.n_kv_heads={attention.n_kv_heads}"
                )
            if attention.head_dim is None and self.d_model % attention.n_heads:
                raise ValueError(
                    f"model.d_model={self.d_model} is not a multiple of model.attention.n_heads={attention.n_heads};"
                    " set model.attention.head_dim or change one of them"
                )
            head_dim = attention.head_dim or self.d_model // attention.n_heads
            if attention.rotary and head_dim % 2:
                raise ValueError(
                    f"a head of size {head_dim} cannot be rotated: set model.attention.head_dim to an even number,"
                    " or model.attention.rotary=false"
                )
        heads = attention.routed_heads
        if heads is not None and heads.shared + heads.top_k > attention.n_heads:
            raise ValueError(
                f"model.attention.routed_heads: shared={heads.shared} and top_k={heads.top_k} heads are more than"
                f" model.attention.n_heads={attention.n_heads}"
            )
        if "M" in symbols:
            self.mamba.check_model(self.d_model)
        if "L" in symbols:
            self.linear_attention.check_model(self.d_model)
        if "W" in symbols and attention.window is None:
            raise ValueError(f"model.pattern={self.pattern} has a W sublayer: set model.attention.window (tokens)")
        return self
