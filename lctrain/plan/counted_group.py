"""RankGroups that tell a CostCounter what they send, and along which dimension of the mesh."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from lctrain.parallel.group import RankGroup
from lctrain.parallel.mesh import MeshGroups
from lctrain.plan.counting import CostCounter

ATTENTION = "attention"
"""The collective of what attention's strategies send, which the simulator prices."""
ATTENTION_KINDS = {"q", "kv", "out", "lse", "dq", "dkv", "dout"}


class CountedGroup(RankGroup):
    """Dimensions whose ranks coincide share a process group, so only the group that was called knows which one is meant."""

    def __init__(self, like: RankGroup, dimension: str, counter: CostCounter) -> None:
        super().__init__(like.process_group)
        self.dimension, self.counter = dimension, counter

    def across(self, ranks: Sequence[int]) -> RankGroup:
        part = CountedGroup(RankGroup(), self.dimension, self.counter)
        part.__dict__.update(super().across(ranks).__dict__)
        return part

    def exchange(self, sends: Sequence[tuple[str, Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[dist.Work]:
        others: defaultdict[str, int] = defaultdict(int)
        for kind, tensor, _ in sends:
            if kind in ATTENTION_KINDS:
                self.counter.sent(self.dimension, ATTENTION, tensor.nbytes)
            else:
                others["exchange"] += tensor.nbytes
        for collective, size in others.items():
            self.counter.sent(self.dimension, collective, size)
        with self.counter.told():
            return super().exchange(sends, receives)

    def all_reduce(self, kind: str, tensor: Tensor) -> Tensor:
        if self.size > 1:
            self.counter.sent(self.dimension, "all_reduce", 2 * tensor.nbytes * (self.size - 1) // self.size)
        with self.counter.told():
            return super().all_reduce(kind, tensor)

    def all_gather(self, kind: str, tensor: Tensor) -> Tensor:
        if self.size > 1:
            self.counter.sent(self.dimension, "all_gather", tensor.nbytes * (self.size - 1))
        with self.counter.told():
            return super().all_gather(kind, tensor)

    def all_to_all(self, kind: str, tensor: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        if self.size > 1:
            row = tensor[:1].nbytes if len(tensor) else 0
            self.counter.sent(self.dimension, "all_to_all", row * (sum(send_rows) - send_rows[self.rank]))
        with self.counter.told():
            return super().all_to_all(kind, tensor, send_rows, receive_rows)


def counted(groups: MeshGroups, counter: CostCounter) -> MeshGroups:
    """The same groups, counted."""
    names = [field.name for field in dataclasses.fields(MeshGroups)]
    return MeshGroups(**{name: CountedGroup(getattr(groups, name), name, counter) for name in names})


def direct_dimensions(groups: MeshGroups) -> dict[dist.ProcessGroup, str]:
    """Whose collectives are called directly, by megatron-core's layers: those of tensor parallelism."""
    return {} if groups.tp.process_group is None else {groups.tp.process_group: "tp"}
