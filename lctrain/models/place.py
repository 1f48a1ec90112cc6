"""Place: what kind of parameter a tensor is and how it is cut. Optimizer, reduction, first values and checkpoints obey it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum

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
    """cuts: which dimension of the tensor is divided evenly over `tp`, `ep` or `etp`, in the order of ranks."""

    family: Family = Family.DENSE
    cuts: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def decays(self, parameter: Tensor) -> bool:
        """Whether weight decay applies: matrices only."""
        return parameter.dim() >= 2 and self.family not in (Family.NORM, Family.STATE)


def parameter_places(model: nn.Module) -> dict[str, Place]:
    """Full name of every parameter -> its Place, from the `places()` of its module; dense and uncut where that is silent."""
    found: dict[str, Place] = {}
    for prefix, module in model.named_modules():
        own = module.places() if hasattr(module, "places") else {}
        for name, _ in module.named_parameters(recurse=False):
            found[f"{prefix}.{name}" if prefix else name] = own.get(name, Place())
    return {name: found[name] for name, _ in model.named_parameters()}


def part_of(whole: Tensor, place: Place, parallel: ModelParallel) -> Tensor:
    """This rank's view of a whole tensor."""
    for dimension, axis in place.cuts.items():
        group = parallel.group(dimension)
        assert whole.shape[axis] % group.size == 0, (dimension, axis, whole.shape)
        size = whole.shape[axis] // group.size
        whole = whole.narrow(axis, group.rank * size, size)
    return whole
