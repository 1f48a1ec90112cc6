"""`L` against the token-by-token recurrence in fp64 and transformers' lightning attention of MiniMax-01."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.config.mamba import LinearAttentionConfig
from lctrain.config.model import ModelConfig
from lctrain.kernels.gated_norm import reference as norm_reference
from lctrain.models.linear_attention import LinearAttention
from lctrain.verify.blocks.compare import (
    LENGTH,
    Case,
    Errors,
    against_oracle,
    decoding,
    errors,
    inputs,
    packed,
    packing,
    randomise,
    run,
)
from lctrain.verify.blocks.huggingface import Tensors, need_transformers, take_weights

D_MODEL = 32
SIZES: dict[str, Any] = {"n_heads": 4, "chunk": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "norm over heads": {},
    "norm over everything": {"norm": "whole"},
    "no activation": {"activation": "none"},
    "narrow heads": {"n_heads": 3, "head_dim": 5},
    "slower with depth": {"slower_with_depth": True},
    "small chunks": {"chunk": 3},
}
MINIMAX: dict[str, Any] = {"norm": "whole", "slower_with_depth": True}
DEPTH = (1, 3)
"""Second of three sublayers that mix tokens."""


def cases() -> Iterator[Case]:
    """Every setting against the recurrence, packing, decoding; transformers."""
    for name, settings in SETTINGS.items():
        yield f"L recurrence, {name}", partial(_against_recurrence, settings)
        yield f"L packing, {name}", lambda settings=settings: packing(_mixer(settings), D_MODEL)  # type: ignore[misc]
        yield f"L decoding, {name}", lambda settings=settings: decoding(_mixer(settings), D_MODEL)  # type: ignore[misc]
    yield "L MiniMaxLightningAttention", partial(_against_transformers, MINIMAX)
    yield "L MiniMaxLightningAttention, narrow heads", partial(_against_transformers, {**MINIMAX, "n_heads": 3, "head_dim": 6})


def _mixer(settings: dict[str, Any]) -> LinearAttention:
    linear = LinearAttentionConfig(**{**SIZES, **settings})
    config = ModelConfig(pattern="L", d_model=D_MODEL, vocab_size=8, norm_eps=1e-6, linear_attention=linear)
    mixer = LinearAttention(config, depth=DEPTH)
    randomise(mixer)
    return mixer


def _against_recurrence(settings: dict[str, Any]) -> Errors:
    mixer = _mixer(settings)
    return against_oracle(mixer, lambda x: by_recurrence(mixer, x, packed().positions), D_MODEL)


def by_recurrence(mixer: LinearAttention, x: Tensor, positions: Tensor) -> Tensor:
    """The layer on packed rows token by token, fp64; positions [B, T] restart in every document."""
    settings, x = mixer.settings, x.double()

    def linear(module: Any, x: Tensor) -> Tensor:
        return F.linear(x, module.weight.double())

    q, k, v = (linear(module, x).unflatten(-1, (mixer.heads, -1)) for module in (mixer.q, mixer.k, mixer.v))
    if settings.activation == "silu":
        q, k, v = (t * torch.sigmoid(t) for t in (q, k, v))
    slopes = torch.tensor([2 ** (-8 * (h + 1) / settings.n_heads) for h in range(settings.n_heads)], dtype=torch.float64)
    if settings.slower_with_depth:
        slopes *= 1 - mixer.depth[0] / (mixer.depth[1] - 1 + 1e-5) + 1e-5
    state = x.new_zeros(x.shape[0], mixer.heads, mixer.head_dim, mixer.head_dim)
    out = []
    for t in range(x.shape[1]):
        state = torch.where((positions[:, t] == 0)[:, None, None, None], 0.0, state * (-slopes).exp()[:, None, None])
        state = state + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        out.append((state @ q[:, t].unsqueeze(-1)).squeeze(-1))
    y = torch.stack(out, dim=1).flatten(2)
    parts = 1 if settings.norm == "whole" else mixer.heads
    gated = norm_reference.rms_norm_then_gate(y, linear(mixer.gate, x), mixer.norm.double(), mixer.eps, parts)
    return linear(mixer.out, gated)


def _against_transformers(settings: dict[str, Any]) -> Errors:
    need_transformers()
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    mixer = _mixer(settings)
    layer, layers = mixer.depth
    config = MiniMaxConfig(
        hidden_size=D_MODEL,
        num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.heads,
        head_dim=mixer.head_dim,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * layers,
        block_size=16,
        hidden_act="silu",
    )
    theirs = MiniMaxLightningAttention(config, layer)
    randomise(theirs, 3)
    translate = partial(translate_minimax, heads=mixer.heads)
    take_weights(mixer, theirs, translate)
    x, dy = inputs(D_MODEL)
    seq = packed(((0, LENGTH),) * 2)
    found = run(lambda x: mixer(x, seq), x, mixer.named_parameters(), dy)
    their = run(lambda x: theirs(x, None, None)[0], x, theirs.named_parameters(), dy)
    grads = translate({name.removeprefix("d "): tensor for name, tensor in their.items() if name.startswith("d ")})
    return errors(found, {"y": their["y"], "dx": their["dx"], **{f"d {name}": tensor for name, tensor in grads.items()}})


def translate_minimax(theirs: Tensors, heads: int, prefix: str = "") -> dict[str, Tensor]:
    """Our names, from MiniMaxLightningAttention's, whose qkv_proj holds query, key and value head by head."""
    q, k, v = theirs[f"{prefix}qkv_proj.weight"].unflatten(0, (heads, 3, -1)).unbind(1)
    found = {f"{name}.weight": part.flatten(0, 1) for name, part in (("q", q), ("k", k), ("v", v))}
    found["gate.weight"] = theirs[f"{prefix}output_gate.weight"]
    found["out.weight"] = theirs[f"{prefix}out_proj.weight"]
    found["norm"] = theirs[f"{prefix}norm.weight"]
    return found
