"""DeepSpeed's own idea of a grid of processes is ours, and the groups that it is handed are those of the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lctrain.engines.deepspeed.mpu import Mpu
from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.parallel.mesh import ProcessMesh

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

SIZES = st.integers(1, 3)


@pytest.fixture(scope="module", autouse=True)
def _end_ranks() -> Iterator[None]:
    yield
    close_pools()


@given(pp=SIZES, dp=SIZES, cp=SIZES, tp=SIZES)
def test_its_topology_numbers_ranks_as_the_mesh_does(pp: int, dp: int, cp: int, tp: int) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    mesh, topology = ProcessMesh(0, dp, cp, tp, pp), PipeModelDataParallelTopology(pp, tp, dp * cp)
    for axis, dimensions in {"pipe": ("pp",), "data": ("dp", "cp"), "model": ("tp",)}.items():
        assert sorted(topology.get_axis_comm_lists(axis)) == sorted(mesh.partition(*dimensions))
    for rank in range(mesh.size):
        at = topology.get_coord(rank)
        assert (at.pipe, at.data, at.model) == (
            mesh.place("pp", rank),
            mesh.place("dp", rank) * cp + mesh.place("cp", rank),
            mesh.place("tp", rank),
        )


def mpu_ranks(rank: int, size: int, dp: int, cp: int, tp: int) -> dict[str, list[int]]:
    mesh = ProcessMesh(rank, dp, cp, tp)
    mpu = Mpu(mesh, mesh.make_groups())
    assert not [name for name in dir(mpu) if "sequence" in name], "ZeRO 0 to 2 would sum where ZeRO-3 averages"
    found = {}
    for name in ("data", "model", "tensor_model"):
        group = getattr(mpu, f"get_{name}_parallel_group")()
        found[name] = dist.get_process_group_ranks(group)
        assert getattr(mpu, f"get_{name}_parallel_world_size")() == len(found[name])
        assert found[name][getattr(mpu, f"get_{name}_parallel_rank")()] == rank
    return found


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 2, 2), (2, 2, 1), (4, 1, 1)])
def test_the_mpu_averages_over_data_and_context_parallel_ranks(sizes: tuple[int, int, int]) -> None:
    dp, cp, tp = sizes
    for rank, found in enumerate(run_ranks(mpu_ranks, dp * cp * tp, *sizes)):
        mesh = ProcessMesh(rank, *sizes)
        for name, dimensions in {"data": ("dp", "cp"), "model": ("tp",), "tensor_model": ("tp",)}.items():
            assert found[name] in mesh.partition(*dimensions)
            assert rank in found[name]
