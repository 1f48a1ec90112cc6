"""Telling DeepSpeed which parameters are experts', of which ranks in one data-parallel group hold different ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lctrain.engines.deepspeed.mpu import Mpu
from lctrain.models.place import Family, parameter_places
from lctrain.parallel.mesh import MeshGroups, ProcessMesh

NAME = "lctrain_experts"
"""DeepSpeed's key for the groups of expert parameters."""


class Experts:
    """Has experts' gradients summed over the edp ranks, which hold copies, and divided by dp * cp like all others'.

    ZeRO 0 to 2 do that for optimizer groups marked `moe`, once they find a module of DeepSpeed's own class MoE. ZeRO-3 refuses
    that class, but cuts and reduces every parameter over a group of its own if the parameter names one.
    Nothing is to be told where the copies of an expert are the data-parallel group anyway.

    names: full names of the parameters that are treated so.
    """

    def __init__(self, model: nn.Module, mesh: ProcessMesh, groups: MeshGroups, mpu: Mpu, stage: int) -> None:
        self.stage, self.names = stage, set()
        if mesh.ep == mesh.etp == mesh.tp == 1:
            return
        self.names = {name for name, place in parameter_places(model).items() if place.family is Family.EXPERT}
        self._copies, self._others = mpu.process_group(groups.edp), mpu.process_group(groups.ep)

    def mark(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the attributes by which DeepSpeed knows expert parameters."""
        for parameter in parameters:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = NAME  # type: ignore[attr-defined]
            if self.stage == 3:
                parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
                parameter.ds_zero_partition_group_name = NAME  # type: ignore[attr-defined]
                parameter.ds_zero_partition_process_group = self._copies  # type: ignore[attr-defined]

    def declare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """All else that DeepSpeed must know before it is given the model, whose experts are marked."""
        if not self.names:
            return
        from deepspeed.utils import groups as registry

        registry._EXPERT_DATA_PARALLEL_GROUP[NAME] = self._copies
        registry._EXPERT_PARALLEL_GROUP[NAME] = self._others
        if self.stage < 3:
            _split_groups(optimizer, [model.get_parameter(name) for name in self.names])
            model.add_module("deepspeed_has_experts", _marker())


def _split_groups(optimizer: torch.optim.Optimizer, experts: list[nn.Parameter]) -> None:
    chosen = {id(parameter) for parameter in experts}
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if mine:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": mine, "moe": True, "name": NAME})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _marker() -> nn.Module:
    """An empty module that is an instance of DeepSpeed's MoE, by which its engine knows that there are experts."""
    from deepspeed.moe.layer import MoE

    class HasExperts(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups exist already."""

        def forward(self, *_: Any) -> Any:
            raise AssertionError("a mark, not a layer")

    return HasExperts()
