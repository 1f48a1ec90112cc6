"""The grid of processes, and the group of those that share a sequence."""

import itertools

import pytest
import torch
import torch.distributed as dist

from lctrain.launch.ranks import run_ranks
from lctrain.parallel.group import RankGroup
from lctrain.parallel.mesh import ProcessMesh

SHAPES = (
    {},
    {"cp": 3},
    {"dp": 4},
    {"dp": 2, "cp": 3},
    {"dp": 2, "cp": 2, "tp": 2, "pp": 2},
    {"dp": 2, "cp": 2, "ep": 4},
    {"cp": 2, "tp": 2, "pp": 3, "ep": 2, "etp": 2},
)
DIMENSIONS = ("pp", "dp", "cp", "tp", "edp", "ep", "etp")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_process_has_a_place_of_its_own(shape: dict[str, int]) -> None:
    size = ProcessMesh(0, **shape).size
    meshes = [ProcessMesh(rank, **shape) for rank in range(size)]
    for grid in (("pp", "dp", "cp", "tp"), ("pp", "edp", "ep", "etp")):
        places = {tuple(mesh.place(name) for name in grid) for mesh in meshes}
        assert places == set(itertools.product(*(range(getattr(meshes[0], name)) for name in grid)))
    neighbours = meshes[0].partition("cp", "tp")
    assert [rank for group in neighbours for rank in group] == list(range(size)), "ranks that talk most are neighbours"
    assert sum(mesh.counts_rows for mesh in meshes) == meshes[0].dp


@pytest.mark.parametrize("shape", SHAPES)
def test_groups_part_the_ranks(shape: dict[str, int]) -> None:
    mesh = ProcessMesh(0, **shape)
    for name in DIMENSIONS:
        groups = mesh.partition(name)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
        for group in groups:
            assert [mesh.place(name, rank) for rank in group] == list(range(getattr(mesh, name)))


def test_printed() -> None:
    assert str(ProcessMesh(0, 2, 2)) == "4 processes = dp 2 x cp 2\n  dp 0: ranks 0 1\n  dp 1: ranks 2 3"


def test_printed_with_all_dimensions() -> None:
    assert str(ProcessMesh(0, dp=1, cp=2, tp=2, pp=2, ep=2)) == (
        "8 processes = pp 2 x dp 1 x cp 2 x tp 2; experts edp 2 x ep 2\n"
        "  pp 0  dp 0: ranks 0 1 | 2 3\n"
        "  pp 1  dp 0: ranks 4 5 | 6 7"
    )


def test_a_group_of_one_needs_no_processes() -> None:
    group = ProcessMesh(0).make_groups().cp
    assert (group.rank, group.size, group.process_group) == (0, 1, None)
    assert group.exchange([], []) == []


def pass_round(rank: int, world_size: int, cp: int):
    """Pass two tensors to the next in the sequence group; returns places, what arrived and the bytes counted."""
    mesh = ProcessMesh(rank, world_size // cp, cp)
    group = mesh.make_groups().cp
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


def collectives(rank: int, world_size: int):
    """Sums, gathers and uneven exchanges over the data-parallel dimension of a 2 x 2 grid, and the bytes counted."""
    groups = ProcessMesh(rank, dp=2, cp=2).make_groups()
    group = groups.dp
    total = group.all_reduce("sum", torch.tensor([float(rank)]))
    gathered = group.all_gather("gather", torch.full((2, 3), rank, dtype=torch.int32))
    send = [0, 3] if group.rank == 0 else [2, 1]
    receive = [0, 2] if group.rank == 0 else [3, 1]
    rows = group.all_to_all("rows", torch.full((sum(send), 5), rank, dtype=torch.int32), send, receive)
    nothing = group.all_to_all("none", torch.empty(0, 5), [0, 0], [0, 0])
    return total, gathered, rows, nothing, dict(group.sent)


def test_collectives_and_their_bytes() -> None:
    for rank, (total, gathered, rows, nothing, sent) in enumerate(run_ranks(collectives, 4)):
        low, high = rank % 2, rank % 2 + 2
        assert total.tolist() == [low + high]
        assert gathered.tolist() == [[[low] * 3] * 2, [[high] * 3] * 2]
        assert rows.tolist() == ([[high] * 5] * 2 if rank < 2 else [[low] * 5] * 3 + [[high] * 5])
        assert nothing.shape == (0, 5)
        assert sent == {"sum": 4, "gather": 24, "rows": 60 if rank < 2 else 40, "none": 0}


def test_collectives_of_one_are_free() -> None:
    group, x = RankGroup(), torch.ones(2, 3)
    assert group.all_reduce("x", x) is x
    assert group.all_gather("x", x).shape == (1, 2, 3)
    assert group.all_to_all("x", x, [2], [2]) is x
    assert not group.sent
