"""Our process mesh as megatron-core's ProcessGroupCollection: groups are handed over, the global parallel_state is not used."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from lctrain.parallel.group import RankGroup
from lctrain.parallel.mesh import MeshGroups, ProcessMesh


def group_collection(mesh: ProcessMesh, groups: MeshGroups) -> ProcessGroupCollection:
    """megatron's names for the groups of this process. Collective.

    mp, tp_ep_pp: ranks that hold different parts of one copy of the dense, of the expert parameters. embd: the first and the
    last pipeline stage, which both hold a tied embedding. intra_dist_opt: all over which the optimizer's state is divided.
    """
    alone = dist.new_group([mesh.rank], use_local_synchronization=True)

    def own(group: RankGroup) -> dist.ProcessGroup:
        return group.process_group or alone

    ends = [sorted({ranks[0], ranks[-1]}) for ranks in mesh.partition("pp")]
    return ProcessGroupCollection(
        tp=own(groups.tp),
        pp=own(groups.pp),
        cp=own(groups.cp),
        dp=own(groups.dp),
        dp_cp=own(groups.dp_cp),
        ep=own(groups.ep),
        expt_tp=own(groups.etp),
        expt_dp=own(groups.edp),
        mp=_new_group(mesh, mesh.partition("pp", "tp"), alone),
        tp_ep_pp=_new_group(mesh, mesh.partition("pp", "ep", "etp"), alone),
        embd=_new_group(mesh, ends, None),
        pos_embd=None,
        intra_dist_opt=dist.group.WORLD,
    )


def _new_group(mesh: ProcessMesh, partition: list[list[int]], otherwise: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """This process's group of a partition, `otherwise` if it is in none of more than one. Collective."""
    mine = otherwise
    for ranks in partition:
        if len(ranks) > 1:
            group = dist.new_group(ranks)
            if mesh.rank in ranks:
                mine = group
    return mine
