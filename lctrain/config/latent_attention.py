"""Settings of latent attention, the symbol `+`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from lctrain.config.rope import RopeConfig
from lctrain.config.strict import Positive, Strict


class LatentAttentionConfig(Strict):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one small latent."""

    n_heads: Positive = 4
    """Heads."""
    q_lora_rank: Positive | None = None
    """Size of the latent that queries come from; null: they come from the residual stream directly."""
    kv_lora_rank: Positive = 64
    """Size of the latent that keys and values come from."""
    qk_nope_head_dim: Positive = 32
    """Entries of a query and key head without position."""
    qk_rope_head_dim: Positive = 16
    """Rotated entries of a query and key head; the key's are common to all heads."""
    v_head_dim: Positive = 32
    """Size of a value head."""
    rope: RopeConfig = RopeConfig()
    """Rotary position embedding of the rotated entries."""
    travel: Literal["auto", "latent", "heads"] = "auto"
    """What travels between context-parallel ranks. latent: kv_lora_rank + qk_rope_head_dim entries per token, expanded into
    keys and values where they are used, and again in backward. heads: keys and values of all heads. auto: whichever is fewer
    bytes with the strategy in use."""

    @model_validator(mode="after")
    def _check(self) -> LatentAttentionConfig:
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"model.latent_attention.qk_rope_head_dim={self.qk_rope_head_dim} cannot be rotated: set it to an even number"
            )
        return self
