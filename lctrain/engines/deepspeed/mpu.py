"""Our mesh as DeepSpeed's `mpu`: which ranks average gradients, and which hold different parts of one model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lctrain.parallel.group import RankGroup
from lctrain.parallel.mesh import MeshGroups, ProcessMesh


class Mpu:
    """Data parallelism is dp x cp, model parallelism tp.

    Nothing here is called sequence_parallel: where DeepSpeed sees such a name, ZeRO 0 to 2 sum gradients over those ranks
    while ZeRO-3 averages them. Without it, every stage averages over all ranks of the data-parallel group.
    """

    def __init__(self, mesh: ProcessMesh, groups: MeshGroups) -> None:
        self._alone = dist.new_group([mesh.rank], use_local_synchronization=True)
        self._dp_cp, self._tp = groups.dp_cp, groups.tp

    def process_group(self, group: RankGroup) -> Any:
        """A group's process group, also that of a group of one, which has none of its own."""
        return group.process_group or self._alone

    def get_data_parallel_group(self) -> Any:
        return self.process_group(self._dp_cp)

    def get_data_parallel_rank(self) -> int:
        return self._dp_cp.rank

    def get_data_parallel_world_size(self) -> int:
        return self._dp_cp.size

    def get_model_parallel_group(self) -> Any:
        return self.process_group(self._tp)

    def get_model_parallel_rank(self) -> int:
        return self._tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tp.size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
