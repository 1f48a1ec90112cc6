"""ProcessMesh: every process's place in the grid of parallel dimensions, as one printable object.

Ranks are numbered as in megatron-core: context-parallel neighbours are adjacent, data-parallel ranks lie cp apart, so that
the processes that talk most sit on one node.
"""

from __future__ import annotations

import dataclasses

import torch.distributed as dist

from lctrain.parallel.group import RankGroup


@dataclasses.dataclass(frozen=True)
class ProcessMesh:
    """A grid of dp x cp processes seen from one of them. rank = dp_rank * cp + cp_rank."""

    dp: int
    cp: int
    rank: int

    @property
    def size(self) -> int:
        """All processes."""
        return self.dp * self.cp

    @property
    def cp_rank(self) -> int:
        """Place within the sequence group."""
        return self.rank % self.cp

    @property
    def dp_rank(self) -> int:
        """Which sequences this process works on."""
        return self.rank // self.cp

    def sequence_ranks(self, dp_rank: int) -> list[int]:
        """Global ranks that share the sequences of one data-parallel rank."""
        return list(range(dp_rank * self.cp, (dp_rank + 1) * self.cp))

    def sequence_group(self) -> RankGroup:
        """This process's sequence group. Collective: every process must call it, once."""
        if self.cp == 1:
            return RankGroup()
        groups = [dist.new_group(self.sequence_ranks(dp_rank)) for dp_rank in range(self.dp)]
        return RankGroup(groups[self.dp_rank])

    def __str__(self) -> str:
        rows = (f"  dp {dp}: ranks {' '.join(map(str, self.sequence_ranks(dp)))}" for dp in range(self.dp))
        return "\n".join([f"{self.size} processes = dp {self.dp} x cp {self.cp}", *rows])
