"""CutParameters: what the torch engine does with parameters of which each rank holds another part, such as experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lctrain.models.model import LanguageModel
from lctrain.models.place import parameter_places
from lctrain.parallel.mesh import MeshGroups, ProcessMesh


class CutParameters:
    """Parameters cut over the ep ranks, with a copy of each part on edp ranks.

    Neither DDP nor FSDP may treat them like the others: a part's gradient is the sum over the edp ranks that hold it (their ep
    groups have sent their tokens to it already), divided by all dp * cp ranks like any other gradient. In checkpoints they are
    whole tensors.

    parameters: full name -> parameter; empty without expert parallelism.
    """

    def __init__(self, model: LanguageModel, mesh: ProcessMesh, groups: MeshGroups, device: torch.device) -> None:
        self.model, self.mesh, self.groups = model, mesh, groups
        self.sharded = False
        self._axes = {name: place.cuts["ep"] for name, place in parameter_places(model).items() if "ep" in place.cuts}
        if groups.ep.size == 1:
            self._axes = {}
        if self._axes:
            ranks = torch.arange(mesh.size).view(mesh.edp, mesh.ep)
            self._grid = DeviceMesh(device.type, ranks.t().contiguous(), mesh_dim_names=("ep", "edp"))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Full name -> parameter."""
        return {name: parameter for name, parameter in self.model.named_parameters() if name in self._axes}

    def shard_over_copies(self) -> None:
        """FSDP: shard every part over the ranks that would hold copies of it, along its first dimension."""
        from torch.distributed.fsdp import fully_shard

        self.sharded = bool(self._axes) and self.mesh.edp > 1
        if not self.sharded:
            return
        for prefix, module in list(self.model.named_modules()):
            own = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if any(name in self._axes for name in own):
                fully_shard(module, mesh=self._grid["edp"])

    def hide_from_ddp(self) -> None:
        """DDP must neither average these nor compare them over ranks."""
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, list(self._axes))

    def reduce_gradients(self) -> None:
        """Make every part's gradient complete. Collective."""
        if not self._axes:
            return
        parameters = list(self.parameters.values())
        grads: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:  # no token came by: the copies' ranks wait all the same
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad)
        if self.sharded:  # FSDP has averaged over the copies
            torch._foreach_mul_(grads, 1 / self.mesh.ep)
            return
        if self.mesh.edp > 1:
            together = _flatten_dense_tensors(grads)
            dist.all_reduce(together, group=self.groups.edp.process_group)
            torch._foreach_copy_(grads, list(_unflatten_dense_tensors(together, grads)))
        torch._foreach_mul_(grads, 1 / self.mesh.size)

    def described(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter's tensor (or one of its shape) as part of the whole one, sharing memory; others as they are."""
        if name not in self._axes or tensor.dim() == 0:
            return tensor
        placements: list[Placement] = [Shard(self._axes[name]), Replicate()]
        if isinstance(tensor, DTensor):
            placements[1], tensor = tensor.placements[0], tensor.to_local()
            shape = list(self.model.get_parameter(name).shape)
        else:
            shape = list(tensor.shape)
        shape[self._axes[name]] *= self.mesh.ep
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(tensor, self._grid, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def undescribed(self, name: str, tensor: Tensor) -> Tensor:
        """Back from `described`."""
        if name not in self._axes or tensor.dim() == 0:
            return tensor
        assert isinstance(tensor, DTensor)
        if not self.sharded:
            return tensor.to_local()
        like = self.model.get_parameter(name)
        return DTensor.from_local(
            tensor.to_local(), self._grid["edp"], tensor.placements[1:], run_check=False, shape=like.shape, stride=like.stride()
        )

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """All of a parameter's tensor, on every rank. Collective."""
        tensor = self.described(name, tensor)
        if self.sharded and name in self._axes and isinstance(tensor, DTensor):  # one dimension at a time, as torch asks for
            tensor = tensor.redistribute(placements=[tensor.placements[0], Replicate()])
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()

    def in_state(self, change: Callable[[str, Tensor], Tensor], state: dict[str, Any]) -> dict[str, Any]:
        """A state of engine.state() with `change` applied to every parameter and its moments."""
        if not self._axes:
            return state
        optimizer = state["optimizer"]
        moments = {
            name: {key: change(name, value) if isinstance(value, Tensor) else value for key, value in entry.items()}
            for name, entry in optimizer["state"].items()
        }
        model = {name: change(name, tensor) for name, tensor in state["model"].items()}
        return {**state, "model": model, "optimizer": {**optimizer, "state": moments}}
