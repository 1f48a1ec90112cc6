"""Place: what kind of parameter a tensor is and how it is cut. Optimizer, reduction, first values and checkpoints obey it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.models.parallel import ModelParallel


class Family(StrEnum):
    """Kinds of parameters. STATE: constants of a recurrence, fp32 in every engine and never decayed."""

    DENSE = "dense"
    NORM = "norm"
    ROUTER = "router"
    EXPERT = "expert"
    STATE = "state"


@dataclasses.dataclass(frozen=True)
class Place:
    """cuts: which axis of the tensor is divided over `tp`, `ep` or `etp`, in the order of ranks.

    lengths: by the same names, how long that axis is in the whole tensor, where ranks may have parts of unequal length: as
    torch.chunk deals them, ceil(length / ranks) each, and the last what remains. Without it parts are equal.
    """

    family: Family = Family.DENSE
    cuts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def decays(self, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices only."""
        return parameter.dim() >= 2 and self.family not in (Family.NORM, Family.STATE)

    @property
    def narrows(self) -> bool:
        """Whether an engine that keeps bf16 weights beside fp32 ones may keep this one so."""
        return self.family not in (Family.STATE, Family.ROUTER)


def parameter_places(model: nn.Module) -> dict[str, Place]:
    """Full name of every parameter -> its Place, from the `places()` of its module; dense and uncut where that is silent."""
    found: dict[str, Place] = {}
    for prefix, module in model.named_modules():
        own = module.places() if hasattr(module, "places") else {}
        for name, _ in module.named_parameters(recurse=False):
            found[f"{prefix}.{name}" if prefix else name] = own.get(name, Place())
    return {name: found[name] for name, _ in model.named_parameters()}


def own_share(length: int, ranks: int, rank: int) -> range:
    """Which of `length` things a rank has: ceil(length / ranks), or what is left for it."""
    share = -(-length // ranks)
    return range(min(length, rank * share), min(length, (rank + 1) * share))


def part_of(whole: Tensor, place: Place, parallel: ModelParallel) -> Tensor:
    """This rank's view of a whole tensor."""
    for dimension, axis in place.cuts.items():
        group, length = parallel.group(dimension), whole.shape[axis]
        assert length == place.lengths.get(dimension, length // group.size * group.size), (dimension, axis, whole.shape)
        own = own_share(length, group.size, group.rank)
        whole = whole.narrow(axis, own.start, len(own))
    return whole


def whole_shape(part: torch.Size, place: Place, parallel: ModelParallel) -> torch.Size:
    """The shape of the tensor that this rank has a part of."""
    shape = list(part)
    for dimension, axis in place.cuts.items():
        shape[axis] = place.lengths.get(dimension, shape[axis] * parallel.group(dimension).size)
    return torch.Size(shape)


def whole_of(part: Tensor, place: Place, parallel: ModelParallel) -> Tensor:
    """The whole tensor, on every rank, from the ranks' parts. Collective."""
    for dimension, axis in place.cuts.items():
        group, length = parallel.group(dimension), place.lengths.get(dimension)
        if length is not None:  # the gather takes parts of one shape
            missing = len(own_share(length, group.size, 0)) - part.shape[axis]
            part = F.pad(part, [0, 0] * (part.dim() - 1 - axis) + [0, missing])
        part = torch.cat(list(group.all_gather("gradients", part)), dim=axis)
        if length is not None:
            part = part.narrow(axis, 0, length)
    return part
