"""Small settings of the mixers that need some, for tests of models that have them all."""

from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.mamba import LinearAttentionConfig, MambaConfig

MIXERS = {
    "mamba": MambaConfig(head_dim=8, d_state=8, n_groups=2, chunk=16),
    "linear_attention": LinearAttentionConfig(n_heads=4),
    "latent_attention": LatentAttentionConfig(
        n_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    ),
}
"""Fields of ModelConfig."""
