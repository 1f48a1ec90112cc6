"""`-` against its formulas in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from lctrain.config.model import MlpConfig, ModelConfig
from lctrain.models.mlp import Mlp
from lctrain.verify.blocks.compare import Case, Errors, against_oracle, decoding, packing, random_mixer

D_MODEL = 32


def cases() -> Iterator[Case]:
    """Every activation, with and without bias."""
    for activation in ("swiglu", "gelu", "relu2"):
        for bias in (False, True):
            name = f"- formula, {activation}" + (", bias" if bias else "")
            yield name, partial(_against_formula, activation, bias)
    yield "- packing", lambda: packing(_mixer("swiglu", True), D_MODEL)
    yield "- decoding", lambda: decoding(_mixer("swiglu", True), D_MODEL)


def _mixer(activation: str, bias: bool) -> Mlp:
    mlp = MlpConfig(d_ff=48, activation=activation, bias=bias)  # type: ignore[arg-type]
    mixer = random_mixer("-", ModelConfig(pattern="-", d_model=D_MODEL, vocab_size=8, mlp=mlp))
    assert isinstance(mixer, Mlp)
    return mixer


def _against_formula(activation: str, bias: bool) -> Errors:
    mixer = _mixer(activation, bias)
    return against_oracle(mixer, lambda x: by_formula(mixer, x), D_MODEL)


def by_formula(mixer: Mlp, x: Tensor) -> Tensor:
    """down(act(up(x))), fp64."""

    def linear(module, x: Tensor) -> Tensor:
        return F.linear(x, module.weight.double(), None if module.bias is None else module.bias.double())

    up = linear(mixer.up, x.double())
    if mixer.gate is not None:
        return linear(mixer.down, F.silu(linear(mixer.gate, x.double())) * up)
    return linear(mixer.down, F.gelu(up, approximate="tanh") if mixer.activation == "gelu" else up.relu().square())
