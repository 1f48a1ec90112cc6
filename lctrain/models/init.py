"""Initial weights: a pure function of the seed and a parameter's name, so that every layout starts from the same model."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lctrain.models.layers import Linear, RMSNorm
from lctrain.models.model import LanguageModel


@torch.no_grad()
def initialise(model: LanguageModel, seed: int) -> None:
    """Fill every parameter in place; sharded parameters get their part of what one process would have.

    Normal with std `init_std`; projections into the residual stream have it divided by sqrt(number of sublayers)
    (Radford et al. 2019); norms 1, biases and attention sinks 0.
    """
    std = model.config.init_std
    seen: set[str] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            seen.add(name)
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            elif name.endswith(("bias", "sinks")):
                parameter.zero_()
            else:
                residual = isinstance(module, Linear) and module.residual
                _fill_normal(parameter, std / math.sqrt(len(model.layers)) if residual else std, seed, name)
    assert seen == {name for name, _ in model.named_parameters()}


def _fill_normal(parameter: nn.Parameter, std: float, seed: int, name: str) -> None:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    _copy(parameter, torch.randn(parameter.shape, generator=generator) * std)


def _copy(parameter: nn.Parameter, whole: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(whole.shape, parameter.device_mesh, parameter.placements)
    part = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    parameter.to_local().copy_(part)
