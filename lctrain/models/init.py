"""Initial weights: a pure function of the seed and a parameter's name, so that every layout starts from the same model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lctrain.models.model import LanguageModel
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Family, Place, parameter_places, part_of, whole_shape


@torch.no_grad()
def initialise(model: LanguageModel, seed: int, only: Container[str] | None = None) -> None:
    """Fill every parameter in place; cut and sharded parameters get their part of what one process would have.

    Normal with std `init_std`; projections into the residual stream have it divided by sqrt(number of sublayers)
    (Radford et al. 2019); norms 1, biases, attention sinks and buffers 0. A module with a method `initial` decides for itself:
    initial(name, whole shape, std, generator) -> values, or None for the above.

    only: full names of the parameters to fill; None for all.
    """
    std = model.config.init_std
    places = parameter_places(model)
    for prefix, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            place = places.pop(name)
            if only is not None and name not in only:
                continue
            scale = std / math.sqrt(model.depth) if _into_residual(module, local) else std
            _copy(parameter, _initial_part(module, local, name, parameter, place, scale, seed, model.parallel))
    assert not places, places
    for buffer in model.buffers():
        buffer.zero_()


def _initial_part(
    module: nn.Module,
    local: str,
    name: str,
    parameter: nn.Parameter,
    place: Place,
    std: float,
    seed: int,
    parallel: ModelParallel,
) -> Tensor:
    shape = list(whole_shape(parameter.shape, place, parallel))
    if place.family is Family.EXPERT:  # one by one: no rank needs room for experts that it does not hold
        own = parameter.shape[0]
        first = own * parallel.ep.rank if "ep" in place.cuts else 0
        rest = Place(place.family, {dimension: axis - 1 for dimension, axis in place.cuts.items() if dimension != "ep"})
        whole = [_whole(module, local, f"{name}/{expert}", shape[1:], std, seed, place) for expert in range(first, first + own)]
        return torch.stack([part_of(expert, rest, parallel) for expert in whole])
    return part_of(_whole(module, local, name, shape, std, seed, place), place, parallel)


def _whole(module: nn.Module, local: str, name: str, shape: list[int], std: float, seed: int, place: Place) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    own: Callable[..., Tensor | None] | None = getattr(module, "initial", None)
    values = own(local, shape, std, generator) if own is not None else None
    if values is not None:
        return values
    if place.family is Family.NORM:
        return torch.ones(shape)
    if name.endswith(("bias", "sinks")):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * std


def _into_residual(module: nn.Module, local: str) -> bool:
    """`residual` of a module: True, or the names of those of its parameters that project into the residual stream."""
    marked = getattr(module, "residual", False)
    return marked if isinstance(marked, bool) else local in marked


def _copy(parameter: nn.Parameter, whole: Tensor) -> None:
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(whole.shape, parameter.device_mesh, parameter.placements)
    part = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    parameter.to_local().copy_(part)
