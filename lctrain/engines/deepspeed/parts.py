"""A parameter as every engine names and shapes it, put together from what the ranks hold, and taken apart again.

One parameter at a time is whole on a rank, never the model: in a described state every rank has an even share of its rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Family, Place, own_share, part_of, whole_of, whole_shape
from lctrain.parallel.group import RankGroup
from lctrain.parallel.mesh import MeshGroups, ProcessMesh


@dataclasses.dataclass(frozen=True)
class Part:
    """What this rank and its copies hold of a parameter or buffer between them: all of it, unless tp, ep or etp cut it."""

    shape: torch.Size
    place: Place


class Parts:
    """The groups over which parts of parameters are spread, and the movements between them."""

    def __init__(self, mesh: ProcessMesh, groups: MeshGroups, parallel: ModelParallel, device: torch.device) -> None:
        self.mesh, self.groups, self.parallel, self.device = mesh, groups, parallel, device
        self._grids: dict[bool, DeviceMesh | None] = {}

    def copies(self, part: Part) -> RankGroup:
        """The ranks that hold the same part."""
        return self.groups.edp if part.place.family is Family.EXPERT else self.groups.dp_cp

    def cuts(self, part: Part) -> dict[str, int]:
        """Dimension of the mesh -> axis of the tensor, for what really is cut."""
        return {name: axis for name, axis in part.place.cuts.items() if self.parallel.group(name).size > 1}

    def joined(self, part: Part, values: Tensor | None, start: int) -> Tensor:
        """The part, fp32, from each copy's run of elements, disjoint, `values` from element `start` on. Collective."""
        flat = torch.zeros(part.shape.numel(), dtype=torch.float32, device=self.device)
        if values is not None:
            flat[start : start + values.numel()] = values
        return self.copies(part).all_reduce("state", flat).view(part.shape)

    def whole(self, part: Part, tensor: Tensor) -> Tensor:
        """The parameter from a tensor of the part's shape. Collective."""
        return whole_of(tensor, self._place(part), self.parallel)

    def described(self, part: Part, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor of the part's shape, as a DTensor that knows the whole."""
        grid = self._grid(part)
        if grid is None:
            return tensor
        rows, cuts = self._rows(part), self.cuts(part)
        names = grid.mesh_dim_names or ()
        placements: list[Placement] = [Shard(cuts[name]) if name in cuts else Replicate() for name in names]
        if self.copies(part).size > 1:
            placements[-1] = Shard(0)
        shape = whole_shape(part.shape, self._place(part), self.parallel)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(tensor[rows].clone(), grid, placements, run_check=False, shape=shape, stride=stride)

    def undescribed(self, part: Part, value: Tensor) -> Tensor:
        """The part from what `described` made of it, or from a whole tensor of the parameter. Collective."""
        if isinstance(value, DTensor) and value.device_mesh == self._grid(part):
            rows = self._rows(part)
            row = part.shape[1:].numel()
            return self.joined(part, value.to_local().reshape(-1), rows.start * row)
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return part_of(whole, self._place(part), self.parallel)

    def _place(self, part: Part) -> Place:
        """The part's place, of whose cuts only the real ones are left."""
        return dataclasses.replace(part.place, cuts=self.cuts(part))

    def _rows(self, part: Part) -> slice:
        """Which rows of the part this rank describes: its share, as torch.chunk deals them."""
        copies = self.copies(part)
        own = own_share(part.shape[0], copies.size, copies.rank)
        return slice(own.start, own.stop)

    def _grid(self, part: Part) -> DeviceMesh | None:
        """The ranks of this pipeline stage, along the dimensions that cut parameters like this one and along its copies."""
        expert = part.place.family is Family.EXPERT
        if expert not in self._grids:
            self._grids[expert] = self._make_grid(expert)
        return self._grids[expert]

    def _make_grid(self, expert: bool) -> DeviceMesh | None:
        mesh, groups = self.mesh, self.groups
        stage = next(ranks for ranks in mesh.partition("dp", "cp", "tp") if mesh.rank in ranks)
        if expert:
            ranks = torch.tensor(stage).view(mesh.edp, mesh.ep, mesh.etp).permute(1, 2, 0)
            along = {"ep": groups.ep, "etp": groups.etp, "edp": groups.edp}
        else:
            ranks = torch.tensor(stage).view(mesh.dp * mesh.cp, mesh.tp).t()
            along = {"tp": groups.tp, "dp_cp": groups.dp_cp}
        used = {name: group for name, group in along.items() if group.size > 1}
        if not used:
            return None
        process_groups: list[Any] = [group.process_group for group in used.values()]
        if len(process_groups) == 1:
            return DeviceMesh.from_group(process_groups[0], self.device.type, mesh_dim_names=tuple(used))
        ranks = ranks.reshape([group.size for group in used.values()])
        return DeviceMesh.from_group(process_groups, self.device.type, mesh=ranks, mesh_dim_names=tuple(used))
