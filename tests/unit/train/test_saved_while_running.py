"""checkpoint.asynchronous under every engine: however late the copy is made, what is saved is the state after its step."""

import time
from importlib.util import find_spec

import pytest
import torch

from lctrain.checkpoint import host_copy
from lctrain.checkpoint.tensors import Reader, load_tensors
from lctrain.config.moe import BalanceConfig, MoeConfig
from lctrain.config.schema import EngineConfig, TrainConfig
from lctrain.launch.process import Process
from lctrain.launch.ranks import run_ranks
from lctrain.run_dir import RunDir
from lctrain.train import train

LATE_S = 0.4
"""Longer than a step of the tiny model."""


def slowly(rank: int, world_size: int, config: TrainConfig, late_s: float) -> int:
    real = host_copy.copy_all

    def late(pairs):
        time.sleep(late_s)
        real(pairs)

    host_copy.copy_all = late
    torch.set_num_threads(1)
    try:
        return train(config, Process(rank, world_size, rank, world_size))
    finally:
        host_copy.copy_all = real


def _tensors(checkpoint) -> dict[str, torch.Tensor]:
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in Reader(checkpoint).read_metadata().state_dict_metadata.items()
        if not name.startswith("rng/")
    }
    load_tensors(checkpoint, found)
    return found


CASES = {  # with tensors that are the engine's own: of DeepSpeed only on one process, on more its states are copies throughout
    "torch": (EngineConfig(), 1),
    "torch, fsdp": (EngineConfig(data_parallel="fsdp"), 2),
    "megatron": (EngineConfig(name="megatron", distributed_optimizer=False), 1),
    "megatron, divided": (EngineConfig(name="megatron"), 2),
    "megatron, bf16": (EngineConfig(name="megatron", dtype="bf16", distributed_optimizer=False), 1),
    "deepspeed, zero 0": (EngineConfig(name="deepspeed", zero=0), 1),
    "deepspeed, zero 2": (EngineConfig(name="deepspeed", zero=2), 1),
}


@pytest.mark.parametrize(("engine", "processes"), CASES.values(), ids=CASES)
def test_a_late_copy_is_of_the_right_step(make_config, tmp_path, engine, processes):
    for package in {engine.name} - {"torch"}:
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    config = make_config(steps=2, checkpoint={"every": 1}, processes=processes)
    moe = MoeConfig(n_experts=4, d_ff=8, balance=BalanceConfig(bias_rate=1e-2))  # the bias of the choice is state as well
    config = config.model_copy(
        update={"engine": engine, "model": config.model.model_copy(update={"pattern": "*E", "moe": moe})}
    )
    contents = []
    for asynchronous in (False, True):
        folder = tmp_path / f"run_{asynchronous}"
        checkpoint = config.checkpoint.model_copy(update={"asynchronous": asynchronous})
        mine = config.model_copy(update={"run_dir": str(folder), "checkpoint": checkpoint})
        assert run_ranks(slowly, processes, mine, LATE_S) == [0] * processes
        contents.append([_tensors(RunDir(folder).checkpoints / f"step-{step:08d}") for step in (1, 2)])
    for at_once, late in zip(*contents, strict=True):
        assert at_once.keys() == late.keys()
        assert any("bias" in name for name in at_once)
        different = [name for name in at_once if not torch.equal(at_once[name], late[name])]
        assert different == []
