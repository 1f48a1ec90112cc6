"""Our process mesh numbers ranks as megatron-core does, and its engine gets the groups that megatron would make."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator

from lctrain.adapters.megatron_cpu import megatron_on_cpu
from lctrain.engines.megatron.groups import group_collection
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.mesh import ProcessMesh

SHAPES = [
    (pp, dp, cp, tp, ep, etp)
    for pp, dp, cp, tp, ep, etp in itertools.product((1, 2, 3), (1, 2, 3), (1, 2), (1, 2, 4), (1, 2, 3, 4), (1, 2))
    if dp * cp * tp % (ep * etp) == 0
]


def test_groups_are_those_of_megatron() -> None:
    assert len(SHAPES) > 200
    for shape in SHAPES:
        _compare_groups(*shape)


def _compare_groups(pp: int, dp: int, cp: int, tp: int, ep: int, etp: int) -> None:
    mesh = ProcessMesh(0, dp, cp, tp, pp, ep, etp)
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    expert = RankGenerator(tp=etp, ep=ep, dp=mesh.edp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    for name in ("tp", "cp", "dp", "pp", "dp-cp", "tp-cp", "tp-pp", "tp-dp-cp"):
        assert sorted(dense.get_ranks(name)) == sorted(mesh.partition(*name.split("-"))), (mesh, name)
    for theirs, ours in {"ep": "ep", "tp": "etp", "dp": "edp", "tp-ep": "etp-ep", "tp-ep-pp": "etp-ep-pp"}.items():
        assert sorted(expert.get_ranks(theirs)) == sorted(mesh.partition(*ours.split("-"))), (mesh, ours)


def collected(rank: int, size: int, mesh: ProcessMesh) -> dict[str, tuple[list[int] | None, list[int] | None]]:
    """Ranks of every group: what we hand over, and what megatron's parallel_state holds."""
    mesh = ProcessMesh(rank, mesh.dp, mesh.cp, mesh.tp, mesh.pp, mesh.ep, mesh.etp)
    ours = group_collection(mesh, mesh.make_groups())
    with megatron_on_cpu():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=mesh.tp,
            pipeline_model_parallel_size=mesh.pp,
            context_parallel_size=mesh.cp,
            expert_model_parallel_size=mesh.ep,
            expert_tensor_parallel_size=mesh.etp,
            distributed_timeout_minutes=1,
        )
    try:
        theirs = {
            "tp": parallel_state.get_tensor_model_parallel_group(),
            "pp": parallel_state.get_pipeline_model_parallel_group(),
            "cp": parallel_state.get_context_parallel_group(),
            "dp": parallel_state.get_data_parallel_group(),
            "dp_cp": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "ep": parallel_state.get_expert_model_parallel_group(),
            "expt_tp": parallel_state.get_expert_tensor_parallel_group(),
            "expt_dp": parallel_state.get_expert_data_parallel_group(),
            "mp": parallel_state.get_model_parallel_group(),
            "tp_ep_pp": parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
        }
        if mesh.pp > 1 and mesh.pp_rank in (0, mesh.pp - 1):
            theirs["embd"] = parallel_state.get_embedding_group()
        return {name: (_ranks(getattr(ours, name)), _ranks(group)) for name, group in theirs.items()}
    finally:
        parallel_state.destroy_model_parallel()


def _ranks(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


@pytest.mark.parametrize(
    "shape",
    [{"pp": 2, "tp": 2, "ep": 2}, {"dp": 2, "cp": 2, "ep": 4}, {"pp": 4}, {"cp": 2, "tp": 2, "etp": 2, "ep": 2}],
    ids=str,
)
def test_collection_is_that_of_an_initialised_parallel_state(shape: dict[str, int]) -> None:
    for groups in run_ranks(collected, 4, ProcessMesh(0, **shape)):
        for name, (ours, theirs) in groups.items():
            assert ours == theirs, name


def test_the_torch_engine_does_not_import_megatron() -> None:
    code = (
        "import sys, lctrain.train, lctrain.engines.torch_engine, lctrain.models.model;"
        "found = [m for m in sys.modules if m.split('.')[0] in ('megatron', 'deepspeed')];"
        "sys.exit(f'imported {found[:3]}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_cuda_only_megatrons_optimizer_is_told_that_tensors_are_on_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("with CUDA nothing is changed")
    from megatron.core.optimizer import optimizer

    ask = eval("lambda tensor: tensor.type()", vars(optimizer))
    with megatron_on_cpu():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1).type() == "torch.FloatTensor"
        assert ask(torch.zeros(1)) == "torch.cuda.FloatTensor"
    assert ask(torch.zeros(1)) == "torch.FloatTensor"
