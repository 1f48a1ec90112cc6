"""The grid of processes, and the group of those that share a sequence."""

import pytest
import torch
import torch.distributed as dist

from lctrain.launch.ranks import run_ranks
from lctrain.parallel.group import RankGroup
from lctrain.parallel.mesh import ProcessMesh


@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (1, 3), (4, 1), (2, 3)])
def test_every_process_has_a_place_of_its_own(dp: int, cp: int) -> None:
    meshes = [ProcessMesh(dp, cp, rank) for rank in range(dp * cp)]
    assert {(mesh.dp_rank, mesh.cp_rank) for mesh in meshes} == {(d, c) for d in range(dp) for c in range(cp)}
    for mesh in meshes:
        assert mesh.size == dp * cp
        assert mesh.sequence_ranks(mesh.dp_rank)[mesh.cp_rank] == mesh.rank
    everyone = [rank for d in range(dp) for rank in meshes[0].sequence_ranks(d)]
    assert everyone == list(range(dp * cp)), "ranks that share a sequence are neighbours"


def test_printed() -> None:
    assert str(ProcessMesh(2, 2, 0)) == "4 processes = dp 2 x cp 2\n  dp 0: ranks 0 1\n  dp 1: ranks 2 3"


def test_a_group_of_one_needs_no_processes() -> None:
    group = ProcessMesh(1, 1, 0).sequence_group()
    assert (group.rank, group.size, group.process_group) == (0, 1, None)
    assert group.exchange([], []) == []


def pass_round(rank: int, world_size: int, cp: int):
    """Pass two tensors to the next in the sequence group; returns places, what arrived and the bytes counted."""
    mesh = ProcessMesh(world_size // cp, cp, rank)
    group = mesh.sequence_group()
    big, small = torch.full((3, 5), float(rank)), torch.full((2,), rank, dtype=torch.int16)
    got_big, got_small = torch.empty_like(big), torch.empty_like(small)
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for work in group.exchange([("kv", big, right), ("lse", small, right)], [(got_big, left), (got_small, left)]):
        work.wait()
    for work in group.exchange([("kv", big, right)], [(got_big, left)]):
        work.wait()
    dist.barrier()
    return mesh.cp_rank, group.rank, group.size, got_big, got_small, dict(group.sent)


@pytest.mark.parametrize("cp", [2, 4])
def test_sequence_groups_exchange_and_count_bytes(cp: int) -> None:
    for rank, (cp_rank, group_rank, size, big, small, sent) in enumerate(run_ranks(pass_round, 4, cp)):
        assert cp_rank == group_rank == rank % cp
        assert size == cp
        left = rank - rank % cp + (rank - 1) % cp
        assert (big == left).all()
        assert (small == left).all()
        assert sent == {"kv": 2 * 3 * 5 * 4, "lse": 2 * 2}


def test_a_group_over_the_default_process_group() -> None:
    assert run_ranks(places, 3) == [(0, 3), (1, 3), (2, 3)]


def places(rank: int, world_size: int) -> tuple[int, int]:
    group = RankGroup(dist.group.WORLD)
    return group.rank, group.size
