"""launcher.processes and the sizes of the grid: what is left open follows from the rest, what contradicts is refused."""

import pytest

from lctrain.config.load import load
from lctrain.config.render import from_yaml, to_yaml
from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError

MEGATRON = "engine=megatron"


def config(*args: str) -> TrainConfig:
    return load(TrainConfig, "train", list(args))


@pytest.mark.parametrize(
    ("args", "grid"),
    [
        ([], (1, 1, 1, 1)),
        (["parallel.cp=4"], (1, 1, 4, 1)),
        (["parallel.dp=2", "parallel.cp=2"], (1, 2, 2, 1)),
        ([MEGATRON, "parallel.tp=2", "parallel.pp=2"], (2, 1, 1, 2)),
        (["recipe=demo"], (1, 1, 2, 1)),
        (["recipe=demo", "parallel.cp=4"], (1, 1, 4, 1)),
        (["recipe=demo", "launcher.processes=4"], (1, 2, 2, 1)),
        (["recipe=demo", MEGATRON, "parallel.tp=2", "parallel.pp=2"], (2, 1, 2, 2)),
        (["recipe=demo", MEGATRON, "model=hybrid_tiny", "parallel.cp=2", "parallel.pp=2"], (2, 1, 2, 1)),
        (["recipe=demo", "engine=deepspeed", "parallel.cp=2", "engine.zero=3"], (1, 1, 2, 1)),
        (["launcher.processes=4", "parallel.cp=2"], (1, 2, 2, 1)),
        (["model=hybrid_tiny", "parallel.ep=4"], (1, 4, 1, 1)),
        (["model=hybrid_tiny", "parallel.ep=4", "parallel.cp=2"], (1, 2, 2, 1)),
        (["model=hybrid_tiny", "parallel.ep=2", "parallel.cp=4"], (1, 1, 4, 1)),
        (["parallel=ring"], (1, 1, 1, 1)),
        (["parallel=ring", "launcher.processes=3"], (1, 1, 3, 1)),
        (["parallel=ring", "launcher.processes=4", "parallel.dp=2"], (1, 2, 2, 1)),
        (["parallel=ring", "parallel.cp=2"], (1, 1, 2, 1)),
        (["parallel=ring", "launcher=slurm", "launcher.nodes=2", "launcher.processes_per_node=2"], (1, 1, 4, 1)),
        (["launcher=slurm", "launcher.nodes=2", "launcher.processes_per_node=2", "parallel.cp=2"], (1, 2, 2, 1)),
    ],
)
def test_what_is_open_follows(args: list[str], grid: tuple[int, ...]) -> None:
    found = config("trainer.global_batch=4", *args)
    assert tuple(found.grid.values()) == grid
    assert found.processes == found.launcher.processes == grid[0] * grid[1] * grid[2] * grid[3]
    mesh = found.mesh(0, found.processes)
    assert (mesh.pp, mesh.dp, mesh.cp, mesh.tp) == grid
    assert from_yaml(TrainConfig, to_yaml(found)) == found


def test_one_config_leaves_no_trace_in_the_next() -> None:
    assert config("parallel.cp=4").processes == 4
    assert config().processes == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["launcher.processes=3", "parallel.cp=2"],
            "launcher.processes=3 is not a multiple of parallel.cp=2; set launcher.proces",
        ),
        (
            ["launcher.processes=4", "parallel.cp=2", "parallel.dp=3"],
            "parallel.dp=3 x parallel.cp=2 is 6, but launcher.processes=4: leave one of them out",
        ),
        (
            ["launcher=slurm", "launcher.nodes=3", "parallel.cp=2"],
            "launcher.processes=3 is not a multiple of parallel.cp=2; set launcher.processes to a multiple of 2, or with 3"
            " processes parallel.cp to 1, 3 (launcher.processes is launcher.nodes=3 x launcher.processes_per_node=1)",
        ),
        (
            ["launcher=slurm", "launcher.nodes=2", "launcher.processes=1"],
            "launcher.processes=1, but nodes=2 x processes_per_node=1 is 2: leave launcher.processes out",
        ),
        (
            ["parallel=ring", "launcher.processes=3", "parallel.dp=2"],
            "parallel.dp=2 x parallel.cp=1 is 2, but launcher.processes=3",
        ),
        (
            ["model=hybrid_tiny", "parallel.ep=3"],
            "model.moe.n_experts=8 is not a multiple of parallel.ep=3; ep can be 1, 2, 4, 8",
        ),
        (["parallel.ep=2"], "parallel.ep=2 has no experts to divide: model.pattern has no E"),
        (
            [MEGATRON, "engine.data_parallel=fsdp"],
            "engine.data_parallel=fsdp is for engine.name=torch; with engine.name=megatron, ",
        ),
        (
            ["engine.distributed_optimizer=false"],
            "engine.distributed_optimizer=false is for engine.name=megatron, but engine.name=torch",
        ),
        (["parallel.cp=0"], "parallel.cp=0: must be a whole number above 0, or null"),
    ],
)
def test_contradictions_name_both(args: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config(*args)
    assert str(caught.value).startswith(message)
