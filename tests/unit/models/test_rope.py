"""Rotary position embedding, against transformers' and in double precision."""

import math

import pytest
import torch

from lctrain.config.rope import RopeConfig
from lctrain.kernels.rotary.fused import rotate
from lctrain.models.rope import inverse_frequencies, rotation

VARIANTS = {
    "none": (RopeConfig(theta=500_000.0), {"rope_type": "default"}),
    "linear": (RopeConfig(scaling="linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        RopeConfig(scaling="yarn", factor=8.0, original_max_position=4096),
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
    ),
    "yarn, other ramp": (
        RopeConfig(theta=1e6, scaling="yarn", factor=40.0, original_max_position=2048, beta_fast=16.0, beta_slow=2.0),
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 2048, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "llama3": (
        RopeConfig(theta=500_000.0, scaling="llama3", factor=32.0, original_max_position=8192),
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "original_max_position_embeddings": 8192,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", VARIANTS)
def test_agrees_with_transformers(name: str, head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config, theirs = VARIANTS[name]
    wanted = int(theirs.get("original_max_position_embeddings", 4096) * theirs.get("factor", 1.0))
    llama = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=wanted,
        rope_parameters={"rope_theta": config.theta, **theirs},
    )
    embedding = LlamaRotaryEmbedding(llama)
    inverse, temperature = inverse_frequencies(config, head_dim)
    torch.testing.assert_close(inverse.float(), embedding.inv_freq, rtol=1e-6, atol=0)
    assert temperature == pytest.approx(embedding.attention_scaling)

    torch.manual_seed(0)
    positions = torch.randint(0, 100, (2, 9))  # small, as transformers forms angles in fp32
    q, k = torch.randn(2, 9, 4, head_dim), torch.randn(2, 9, 2, head_dim)
    cos, sin = rotation(config, head_dim, positions)
    want = apply_rotary_pos_emb(q, k, *embedding(q, positions), unsqueeze_dim=2)
    for ours, other in zip((rotate(q, cos, sin), rotate(k, cos, sin)), want, strict=True):
        torch.testing.assert_close(ours, other, atol=3e-5, rtol=0)


def test_a_million_tokens_in() -> None:
    """Angles stay exact where fp32 products would be off by hundredths of a radian."""
    position = 1_000_003
    config = RopeConfig()
    cos, sin = rotation(config, 64, torch.tensor([[position]]))
    for pair in range(32):
        angle = position * config.theta ** (-2 * pair / 64)
        assert float(cos[0, 0, 0, pair]) == pytest.approx(math.cos(angle), abs=2e-7)
        assert float(sin[0, 0, 0, pair]) == pytest.approx(math.sin(angle), abs=2e-7)
    assert cos.dtype == sin.dtype == torch.float32


def test_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 32, dtype=torch.float64) for _ in range(2))

    def score(at: int, to: int) -> float:
        turned = [rotate(x, *rotation(RopeConfig(), 32, torch.tensor([[p]]))) for x, p in ((q, at), (k, to))]
        return float((turned[0] * turned[1]).sum())

    assert score(1007, 1002) == pytest.approx(score(5, 0), abs=1e-6)
    assert score(1_000_007, 1_000_002) == pytest.approx(score(5, 0), abs=1e-6)
    assert score(6, 0) != pytest.approx(score(5, 0), abs=1e-3)


def test_position_zero_is_not_turned() -> None:
    cos, sin = rotation(RopeConfig(), 16, torch.zeros(1, 1, dtype=torch.int64))
    assert (cos == 1).all()
    assert (sin == 0).all()
    assert cos.shape == (1, 1, 1, 8)
