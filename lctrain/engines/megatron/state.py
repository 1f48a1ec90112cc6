"""The megatron engine's weights, optimizer state and gradients under names and in shapes that no layout has a part in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lctrain.models.place import Place, whole_of, whole_shape
from lctrain.optim import checkpoint_groups

if TYPE_CHECKING:
    from lctrain.engines.megatron.engine import MegatronEngine


class EngineState:
    """Every rank describes the parameters of its own pipeline stage; cut ones are DTensors that know the whole."""

    def __init__(self, engine: MegatronEngine) -> None:
        self.engine = engine
        self._grids: dict[tuple[str, ...], DeviceMesh] = {}

    def state(self) -> dict[str, Any]:
        """See Engine."""
        model, optimizer = {}, {}
        for name, tensors in self.engine.optimizer.tensors():
            place = self.engine.places[name]
            model[name] = self._described(tensors.pop("main"), place)
            optimizer[name] = {key: self._described(x, place) if x.dim() else x for key, x in tensors.items()}
        for piece in self.engine.pieces:
            model.update(piece.named_buffers())
        groups = checkpoint_groups(self.engine.model, self.engine.config.optim)
        return {"model": model, "optimizer": {"state": optimizer, "param_groups": groups}}

    def load(self, state: dict[str, Any]) -> None:
        """See Engine."""
        buffers = {name: buffer for piece in self.engine.pieces for name, buffer in piece.named_buffers()}
        for name, main in state["model"].items():
            if name in buffers:
                buffers[name].copy_(main)
                continue
            moments = state["optimizer"]["state"][name]
            self.engine.optimizer.set(name, {key: _own(x) for key, x in {"main": main, **moments}.items()})

    def gradients(self) -> dict[str, Tensor]:
        """See Engine."""
        engine, found = self.engine, {}
        if engine.config.engine.distributed_optimizer:
            self._complete_gradients()
        for name, parameter in engine.parameters.items():
            own: Tensor = parameter.main_grad  # type: ignore[attr-defined]
            found[name] = whole_of(own, engine.places[name], engine.parallel).float().cpu()
        if engine.mesh.pp == 1:
            return {name: x.clone() for name, x in found.items()} if engine.mesh.rank == 0 else {}
        stages: list[Any] | None = [None] * engine.mesh.size if engine.mesh.rank == 0 else None
        first_of_stage = engine.mesh.rank % engine.mesh.stage_size == 0
        dist.gather_object(found if first_of_stage else {}, stages)
        return {name: x for stage in stages or () for name, x in stage.items()}

    def _complete_gradients(self) -> None:
        """The distributed optimizer leaves every rank its own part of each bucket: gather the others'."""
        for chunk in self.engine.chunks:
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, own, group=group)

    def _described(self, tensor: Tensor, place: Place) -> Tensor:
        cuts = {name: axis for name, axis in place.cuts.items() if getattr(self.engine.groups, name).size > 1}
        if not cuts:
            return tensor
        shape = whole_shape(tensor.shape, place, self.engine.parallel)
        stride = torch.empty(shape, device="meta").stride()
        grid = self._grid(tuple(cuts), tensor.device.type)
        shards = [Shard(axis) for axis in cuts.values()]
        return DTensor.from_local(tensor, grid, shards, run_check=False, shape=shape, stride=stride)

    def _grid(self, dimensions: tuple[str, ...], device: str) -> DeviceMesh:
        """The ranks that hold the parts of a parameter cut along `dimensions`."""
        if (*dimensions, device) not in self._grids:
            mesh = self.engine.mesh
            mine = next(ranks for ranks in mesh.partition(*dimensions) if mesh.rank in ranks)
            ranks = torch.tensor(mine).view([getattr(mesh, name) for name in dimensions])
            groups = [getattr(self.engine.groups, name).process_group for name in dimensions]
            self._grids[*dimensions, device] = DeviceMesh.from_group(
                groups if len(groups) > 1 else groups[0],
                device,
                mesh=ranks if len(groups) > 1 else None,
                mesh_dim_names=dimensions,
            )
        return self._grids[*dimensions, device]


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
