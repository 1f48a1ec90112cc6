"""`+` against the paper's formula in fp64 and transformers' DeepSeek-V3 attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.model import ModelConfig
from lctrain.config.rope import RopeConfig
from lctrain.models.latent_attention import LatentAttention
from lctrain.models.rope import rotation, yarn_temperature
from lctrain.parallel.mask import AttentionMask
from lctrain.verify.blocks.attention import turn
from lctrain.verify.blocks.compare import (
    DOCUMENTS,
    LENGTH,
    Case,
    Errors,
    against_oracle,
    decoding,
    errors,
    inputs,
    packed,
    packing,
    random_mixer,
    run,
)
from lctrain.verify.blocks.huggingface import Tensors, halves_from_pairs, need_transformers, take_weights

D_MODEL = 32
SIZES: dict[str, Any] = {
    "n_heads": 3,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}
YARN = RopeConfig(scaling="yarn", factor=4.0, original_max_position=16, mscale=0.8, mscale_all_dim=0.9)
SETTINGS: dict[str, dict[str, Any]] = {
    "low-rank queries": {},
    "full queries": {"q_lora_rank": None},
    "yarn": {"rope": YARN},
    "wide values": {"v_head_dim": 16},
    "latents as they travel": {"travel": "latent"},
}


def cases() -> Iterator[Case]:
    """Every setting against the formula, transformers, packing, decoding."""
    for name, settings in SETTINGS.items():
        yield f"+ formula, {name}", partial(_against_formula, settings)
        yield f"+ packing, {name}", partial(_packing, settings)
        yield f"+ decoding, {name}", partial(_decoding, settings)
    for name in ("low-rank queries", "full queries", "yarn"):
        yield f"+ DeepseekV3Attention, {name}", partial(_against_transformers, SETTINGS[name])


def _mixer(settings: dict[str, Any]) -> LatentAttention:
    latent = LatentAttentionConfig(**{**SIZES, **settings})
    mixer = random_mixer("+", ModelConfig(pattern="+", d_model=D_MODEL, vocab_size=8, norm_eps=1e-6, latent_attention=latent))
    assert isinstance(mixer, LatentAttention)
    return mixer


def _packing(settings: dict[str, Any]) -> Errors:
    return packing(_mixer(settings), D_MODEL)


def _decoding(settings: dict[str, Any]) -> Errors:
    return decoding(_mixer(settings), D_MODEL)


def _against_formula(settings: dict[str, Any]) -> Errors:
    mixer = _mixer(settings)
    return against_oracle(mixer, lambda x: by_formula(mixer, x), D_MODEL)


def by_formula(mixer: LatentAttention, x: Tensor) -> Tensor:
    """Equations 9 to 19 of arXiv 2405.04434 on packed rows, fp64."""
    settings, x = mixer.settings, x.double()
    cos, sin = (t.double() for t in rotation(settings.rope, settings.qk_rope_head_dim, packed().positions))

    def linear(module: Any, x: Tensor) -> Tensor:
        return F.linear(x, module.weight.double())

    def norm(module: Any, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * module.weight.double()

    q = linear(mixer.q_up, x if mixer.q_down is None else norm(mixer.q_norm, linear(mixer.q_down, x)))
    q_plain, q_turned = q.unflatten(-1, (settings.n_heads, -1)).split(
        [settings.qk_nope_head_dim, settings.qk_rope_head_dim], -1
    )
    compressed, k_turned = linear(mixer.kv_down, x).split([settings.kv_lora_rank, settings.qk_rope_head_dim], -1)
    up = linear(mixer.kv_up, norm(mixer.kv_norm, compressed)).unflatten(-1, (settings.n_heads, -1))
    k_plain, v = up.split([settings.qk_nope_head_dim, settings.v_head_dim], -1)
    q = torch.cat([q_plain, turn(q_turned, cos, sin)], -1)
    k = torch.cat([k_plain, turn(k_turned.unsqueeze(2), cos, sin).expand(-1, -1, settings.n_heads, -1)], -1)
    scale = q.shape[-1] ** -0.5 * yarn_temperature(settings.rope, settings.rope.mscale_all_dim) ** 2
    live = AttentionMask(DOCUMENTS).live(LENGTH)
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) * scale).masked_fill(~live[:, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    return linear(mixer.out, torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))


def _against_transformers(settings: dict[str, Any]) -> Errors:
    need_transformers()
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    mixer = _mixer(settings)
    own = mixer.settings
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": own.rope.theta}
    if own.rope.scaling == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": own.rope.factor,
            "original_max_position_embeddings": own.rope.original_max_position,
            "beta_fast": own.rope.beta_fast,
            "beta_slow": own.rope.beta_slow,
            "mscale": own.rope.mscale,
            "mscale_all_dim": own.rope.mscale_all_dim,
        }
    sizes = own.model_dump(include={"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"})
    config = DeepseekV3Config(
        hidden_size=D_MODEL,
        num_attention_heads=own.n_heads,
        num_key_value_heads=own.n_heads,
        rope_parameters=rope,
        max_position_embeddings=64,
        attn_implementation="eager",
        **sizes,
    )
    theirs = DeepseekV3Attention(config, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** (parameter.dim() > 1) ** 0.5
            )
    translate = partial(translate_deepseek, settings=own)
    take_weights(mixer, theirs, translate)
    x, dy = inputs(D_MODEL)
    seq = packed(((0, LENGTH),) * 2)
    found = run(lambda x: mixer(x, seq), x, mixer.named_parameters(), dy)
    turn_by = DeepseekV3RotaryEmbedding(config)(x, torch.arange(LENGTH).expand(2, -1))
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), float("-inf"))
    their = run(lambda x: theirs(x, turn_by, mask[None, None])[0], x, theirs.named_parameters(), dy)
    grads = translate({name.removeprefix("d "): tensor for name, tensor in their.items() if name.startswith("d ")})
    return errors(found, {"y": their["y"], "dx": their["dx"], **{f"d {name}": tensor for name, tensor in grads.items()}})


def translate_deepseek(theirs: Tensors, settings: LatentAttentionConfig, prefix: str = "") -> dict[str, Tensor]:
    """Our names and order of rotated entries, from DeepseekV3Attention's."""
    rotated, heads = settings.qk_rope_head_dim, settings.n_heads
    names = {"kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "out": "o_proj"}
    if settings.q_lora_rank is not None:
        names |= {"q_down": "q_a_proj", "q_norm": "q_a_layernorm"}
    found = {f"{ours}.weight": theirs[f"{prefix}{name}.weight"] for ours, name in names.items()}
    q_up = theirs[f"{prefix}{'q_proj' if settings.q_lora_rank is None else 'q_b_proj'}.weight"]
    found["q_up.weight"] = halves_from_pairs(q_up, heads, rotated)
    found["kv_down.weight"] = halves_from_pairs(theirs[f"{prefix}kv_a_proj_with_mqa.weight"], 1, rotated)
    return found
