"""ProcessMesh: every process's place in the grid of parallel dimensions, as one printable object.

Ranks are numbered as in megatron-core: tensor-parallel neighbours are adjacent, then context-, data- and pipeline-parallel
ones, so that the processes that talk most sit on one node. Experts fold over the dp x cp x tp ranks of a pipeline stage: the
same ranks, numbered again as edp x ep x etp.
"""

from __future__ import annotations

import dataclasses
import math

import torch.distributed as dist

from lctrain.parallel.group import RankGroup

DENSE = ("pp", "dp", "cp", "tp")
"""Dimensions of all but experts, slowest first."""
EXPERT = ("pp", "edp", "ep", "etp")
"""Dimensions of experts, slowest first."""


@dataclasses.dataclass(frozen=True)
class MeshGroups:
    """This process's group along each dimension, itself included; groups of one need no process group."""

    pp: RankGroup
    dp: RankGroup
    cp: RankGroup
    tp: RankGroup
    dp_cp: RankGroup
    edp: RankGroup
    ep: RankGroup
    etp: RankGroup


@dataclasses.dataclass(frozen=True)
class ProcessMesh:
    """A grid of pp x dp x cp x tp processes seen from one of them.

    rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank. Within a pipeline stage, experts see the same ranks as
    (edp_rank * ep + ep_rank) * etp + etp_rank.
    """

    rank: int
    dp: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        assert self.dp * self.cp * self.tp % (self.ep * self.etp) == 0, self
        assert 0 <= self.rank < self.size, self

    @property
    def size(self) -> int:
        """All processes."""
        return self.pp * self.stage_size

    @property
    def stage_size(self) -> int:
        """Processes of one pipeline stage."""
        return self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """Copies of every expert."""
        return self.stage_size // (self.ep * self.etp)

    @property
    def cp_rank(self) -> int:
        """Place among the ranks that share a sequence."""
        return self.place("cp")

    @property
    def dp_rank(self) -> int:
        """Which sequences this process works on."""
        return self.place("dp")

    @property
    def tp_rank(self) -> int:
        """Place among the ranks that share a layer's matrices."""
        return self.place("tp")

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.place("pp")

    @property
    def counts_rows(self) -> bool:
        """Whether this is the one, of all ranks that work on the same sequences, that counts what all of them know."""
        return self.pp_rank == self.cp_rank == self.tp_rank == 0

    def place(self, dimension: str, rank: int | None = None) -> int:
        """Coordinate of a rank (this one's if None) along pp, dp, cp, tp, edp, ep or etp."""
        grid = DENSE if dimension in DENSE else EXPERT
        inner = math.prod(getattr(self, name) for name in grid[grid.index(dimension) + 1 :])
        return (self.rank if rank is None else rank) // inner % getattr(self, dimension)

    def partition(self, *dimensions: str) -> list[list[int]]:
        """All ranks in groups that differ only along `dimensions` (all of one grid), each group in the order of ranks."""
        grid = DENSE if set(dimensions) <= set(DENSE) else EXPERT
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            others = tuple(self.place(name, rank) for name in grid if name not in dimensions)
            groups.setdefault(others, []).append(rank)
        return list(groups.values())

    def make_groups(self) -> MeshGroups:
        """This process's groups. Collective: every process must call it, once."""
        made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}  # dimensions that coincide share a process group
        dimensions = {field.name: tuple(field.name.split("_")) for field in dataclasses.fields(MeshGroups)}
        return MeshGroups(**{name: self._group(made, *along) for name, along in dimensions.items()})

    def _group(self, made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup], *dimensions: str) -> RankGroup:
        partition = tuple(tuple(ranks) for ranks in self.partition(*dimensions))
        if len(partition[0]) == 1:
            return RankGroup()
        if partition not in made:
            groups = [(ranks, dist.new_group(list(ranks))) for ranks in partition]
            made[partition] = next(group for ranks, group in groups if self.rank in ranks)
        return RankGroup(made[partition])

    @property
    def sizes(self) -> str:
        """`8 processes = dp 2 x cp 2 x tp 2`, dimensions of size 1 left out but for dp and cp."""
        dense = " x ".join(f"{name} {getattr(self, name)}" for name in DENSE if getattr(self, name) > 1 or name in ("dp", "cp"))
        text = f"{self.size} process{'es' if self.size > 1 else ''} = {dense}"
        if self.ep * self.etp == 1:
            return text
        return f"{text}; experts edp {self.edp} x ep {self.ep}" + (f" x etp {self.etp}" if self.etp > 1 else "")

    def __str__(self) -> str:
        lines = [self.sizes]
        for ranks in self.partition("cp", "tp"):
            where = f"  dp {self.place('dp', ranks[0])}: ranks "
            if self.pp > 1:
                where = f"  pp {self.place('pp', ranks[0])}" + where
            rows = [ranks[i : i + self.tp] for i in range(0, len(ranks), self.tp)]
            lines.append(where + (" | " if self.tp > 1 else " ").join(" ".join(map(str, row)) for row in rows))
        return "\n".join(lines)
