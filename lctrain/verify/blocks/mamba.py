"""`M` against the token-by-token recurrence in fp64 and transformers' Mamba2 and NemotronH mixers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.config.mamba import MambaConfig
from lctrain.config.model import ModelConfig
from lctrain.kernels.causal_conv import reference as conv_reference
from lctrain.kernels.gated_norm import reference as norm_reference
from lctrain.kernels.ssd import reference as ssd_reference
from lctrain.models.mamba import Mamba2
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
    random_mixer,
    randomise,
    run,
)
from lctrain.verify.blocks.huggingface import Tensors, need_transformers, take_weights

D_MODEL = 32
SIZES: dict[str, Any] = {"head_dim": 8, "d_state": 6, "n_groups": 2, "chunk": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "two groups": {},
    "one group": {"n_groups": 1},
    "a group per head": {"n_groups": 8},
    "bias": {"bias": True},
    "no bias of the convolution": {"conv_bias": False, "conv_kernel": 2},
    "limited steps": {"dt_limit_min": 0.8, "dt_limit_max": 1.6},
    "narrow": {"d_inner": 24, "head_dim": 4},
    "one chunk": {"chunk": 128},
    "small chunks": {"chunk": 3},
}


def cases() -> Iterator[Case]:
    """Every setting against the recurrence, packing, decoding; transformers."""
    for name, settings in SETTINGS.items():
        yield f"M recurrence, {name}", partial(_against_recurrence, settings)
        yield f"M packing, {name}", lambda settings=settings: packing(_mixer(settings), D_MODEL)  # type: ignore[misc]
        yield f"M decoding, {name}", lambda settings=settings: decoding(_mixer(settings), D_MODEL)  # type: ignore[misc]
    for name in ("two groups", "one group", "bias", "limited steps"):
        yield f"M Mamba2Mixer, {name}", partial(_against_transformers, SETTINGS[name], "mamba2")
    for name in ("two groups", "one group"):
        yield f"M NemotronHMamba2Mixer, {name}", partial(_against_transformers, SETTINGS[name], "nemotron_h")


def _mixer(settings: dict[str, Any]) -> Mamba2:
    mamba = MambaConfig(**{**SIZES, **settings})
    mixer = random_mixer("M", ModelConfig(pattern="M", d_model=D_MODEL, vocab_size=8, mamba=mamba))
    assert isinstance(mixer, Mamba2)
    return mixer


def _against_recurrence(settings: dict[str, Any]) -> Errors:
    mixer = _mixer(settings)
    return against_oracle(mixer, lambda x: by_recurrence(mixer, x, packed().positions), D_MODEL)


def by_recurrence(mixer: Mamba2, x: Tensor, positions: Tensor) -> Tensor:
    """The layer on packed rows token by token, fp64; positions [B, T] restart in every document."""
    settings, groups, x = mixer.settings, mixer.groups, x.double()

    def linear(module: Any, x: Tensor) -> Tensor:
        return F.linear(x, module.weight.double(), None if module.bias is None else module.bias.double())

    def conv(module: Any, x: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias.double()
        return conv_reference.causal_conv(x, module.weight.double(), bias, positions)

    values = conv(mixer.conv_x, linear(mixer.x, x)).unflatten(-1, (mixer.heads, settings.head_dim))
    b = conv(mixer.conv_B, linear(mixer.B, x)).unflatten(-1, (groups, settings.d_state))
    c = conv(mixer.conv_C, linear(mixer.C, x)).unflatten(-1, (groups, settings.d_state))
    dt = F.softplus(linear(mixer.dt, x) + mixer.dt_bias.double()).clamp(settings.dt_limit_min, settings.dt_limit_max)
    decay, skip = -mixer.A_log.double().exp(), mixer.D.double()
    y, _ = ssd_reference.ssd(values, dt, decay, b, c, skip, resets=positions == 0)
    gated = norm_reference.gated_rms_norm(y.flatten(2), linear(mixer.z, x), mixer.norm.double(), mixer.eps, groups)
    return linear(mixer.out, gated)


def _against_transformers(settings: dict[str, Any], family: str) -> Errors:
    need_transformers()
    mixer = _mixer(settings)
    theirs = transformers_mixer(mixer, family)
    randomise(theirs, 3)
    translate = partial(translate_mamba2, mixer=mixer)
    take_weights(mixer, theirs, translate)
    x, dy = inputs(D_MODEL)
    seq = packed(((0, LENGTH),) * 2)  # whole rows: their torch path knows no documents
    found = run(lambda x: mixer(x, seq), x, mixer.named_parameters(), dy)
    their = run(lambda x: theirs(x), x, theirs.named_parameters(), dy)
    grads = translate({name.removeprefix("d "): tensor for name, tensor in their.items() if name.startswith("d ")})
    return errors(found, {"y": their["y"], "dx": their["dx"], **{f"d {name}": tensor for name, tensor in grads.items()}})


def transformers_mixer(mixer: Mamba2, family: str) -> torch.nn.Module:
    """A Mamba-2 mixer of transformers' model `family` (mamba2 or nemotron_h) of our mixer's shape."""
    own = mixer.settings
    d_model, width = mixer.x.weight.shape[1], mixer.x.weight.shape[0]
    from transformers.utils import logging

    logging.set_verbosity_error()  # without mamba_ssm it warns that its torch path is slow; that is the one to compare with
    limit = (own.dt_limit_min, float("inf") if own.dt_limit_max is None else own.dt_limit_max)
    if family == "nemotron_h":
        from transformers import NemotronHConfig
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

        nemotron = NemotronHConfig(
            hidden_size=d_model,
            mamba_num_heads=mixer.heads,
            mamba_head_dim=own.head_dim,
            ssm_state_size=own.d_state,
            n_groups=own.n_groups,
            conv_kernel=own.conv_kernel,
            chunk_size=own.chunk,
            layer_norm_epsilon=mixer.eps,
            use_conv_bias=own.conv_bias,
            time_step_limit=limit,
        )
        return NemotronHMamba2Mixer(nemotron, 0)
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=d_model,
        num_heads=mixer.heads,
        head_dim=own.head_dim,
        state_size=own.d_state,
        n_groups=own.n_groups,
        expand=width // d_model,
        conv_kernel=own.conv_kernel,
        chunk_size=own.chunk,
        num_hidden_layers=1,
        layer_norm_epsilon=mixer.eps,
        use_bias=own.bias,
        use_conv_bias=own.conv_bias,
        time_step_limit=limit,
    )
    return Mamba2Mixer(config, 0)


def translate_mamba2(theirs: Tensors, mixer: Mamba2, prefix: str = "") -> dict[str, Tensor]:
    """Our names, from those of transformers' Mamba-2 mixers: their in_proj is z, x, B, C, dt, their convolution x, B, C."""
    width, states, heads = mixer.z.weight.shape[0], mixer.B.weight.shape[0], mixer.heads
    found = {name: theirs[f"{prefix}{name}"] for name in ("A_log", "D", "dt_bias")}
    found["norm"] = theirs[f"{prefix}norm.weight"]
    for kind in ("weight", "bias"):
        if f"{prefix}in_proj.{kind}" in theirs:
            parts = theirs[f"{prefix}in_proj.{kind}"].split([width, width, states, states, heads])
            found |= {f"{name}.{kind}": part for name, part in zip(("z", "x", "B", "C", "dt"), parts, strict=True)}
            found[f"out.{kind}"] = theirs[f"{prefix}out_proj.{kind}"]
        if f"{prefix}conv1d.{kind}" in theirs:
            parts = theirs[f"{prefix}conv1d.{kind}"].split([width, states, states])
            for name, part in zip(("conv_x", "conv_B", "conv_C"), parts, strict=True):
                found[f"{name}.{kind}"] = part.squeeze(1) if kind == "weight" else part
    return found
