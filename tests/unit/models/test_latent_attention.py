"""The mixer `+` on one process: oracle, cost, settings; over ranks see tests/parity/test_latent_attention.py."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.model import ModelConfig
from lctrain.models.latent_attention import LatentAttention
from lctrain.models.parallel import ModelParallel
from lctrain.parallel.mask import AttentionMask
from lctrain.verify.blocks import BAR
from lctrain.verify.blocks.huggingface import Skipped
from lctrain.verify.blocks.latent_attention import cases

DOCUMENTS = ((0, 9, 10, 31), (0, 40))
TOKENS = 31 + 40


def make(dtype: torch.dtype = torch.float32, **settings: object) -> LatentAttention:
    sizes = {"n_heads": 3, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7}
    latent = LatentAttentionConfig(**{**sizes, **settings})
    mixer = LatentAttention(ModelConfig(pattern="+", d_model=32, vocab_size=8, latent_attention=latent), ModelParallel())
    torch.manual_seed(0)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return mixer.to(dtype)


@pytest.mark.parametrize(("name", "check"), list(cases()), ids=[name for name, _ in cases()])
def test_against_oracles(name: str, check) -> None:
    try:
        errors = check()
    except Skipped as reason:
        pytest.skip(str(reason))
    assert errors
    assert max(errors.values()) <= BAR, errors


@pytest.mark.parametrize("rank", [12, None])
def test_flops_count_live_entries_and_every_product(rank: int | None) -> None:
    mixer = make(q_lora_rank=rank)
    products = sum(p.numel() for p in mixer.parameters() if p.dim() == 2)
    live = sum(int(AttentionMask((borders,)).live(40).sum()) for borders in DOCUMENTS)
    assert mixer.flops(DOCUMENTS) == 2 * TOKENS * products + 2 * 3 * (10 + 7) * live
    x = torch.randn(1, TOKENS, 32)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        mixer.q_up(x if rank is None else mixer.q_down(x))
        mixer.kv_up(mixer.kv_down(x)[..., :10])
        mixer.out(torch.randn(1, TOKENS, 21))
    assert counted.get_total_flops() == 2 * TOKENS * products


@pytest.mark.parametrize("travel", ["latent", "heads"])
def test_bf16_is_near_fp32(make_seq, travel: str) -> None:
    mixer, seq = make(travel=travel), make_seq(DOCUMENTS, 40)
    x = torch.randn(2, 40, 32)
    half = x.bfloat16().requires_grad_()
    y = mixer(half, seq)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert half.grad is not None
    assert half.grad.isfinite().all()
    assert all(p.grad.dtype == torch.float32 for p in mixer.parameters())
    torch.testing.assert_close(y.float(), mixer(x, seq), atol=0.3, rtol=0.1)


def test_one_token(make_seq) -> None:
    """A token alone sees itself, so its value is all there is."""
    mixer = make(torch.float64)
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    latent = mixer.kv_norm(mixer.kv_down(x)[..., :10])
    values = mixer.kv_up(latent).unflatten(-1, (3, -1))[..., 6:]
    torch.testing.assert_close(mixer(x, make_seq([(0, 1)])), mixer.out(values.flatten(2)))


def test_keys_and_values_are_not_kept_for_backward_where_latents_travel(make_seq) -> None:
    def kept(travel: str) -> int:
        mixer, sizes = make(travel=travel, n_heads=16), []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            mixer(torch.randn(1, 256, 32), make_seq([(0, 256)]))
        return sum(sizes)

    assert kept("heads") - kept("latent") > 1.9 * 256 * 16 * 10  # keys and values, less latents kept twice


def test_an_odd_rotated_size_is_refused() -> None:
    with pytest.raises(ValidationError, match="qk_rope_head_dim=5"):
        LatentAttentionConfig(qk_rope_head_dim=5)
