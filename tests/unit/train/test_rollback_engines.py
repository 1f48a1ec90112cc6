"""Going back under every engine: the run equals one that left the batch out from the beginning, whatever the engine divides."""

import dataclasses
import math
import shutil
from importlib.util import find_spec

import pytest
import torch

import lctrain.train
from lctrain.audit.check import audit
from lctrain.audit.history import read_history
from lctrain.config.schema import EngineConfig, ParallelConfig, TrainConfig
from lctrain.engines.make import make_engine
from lctrain.faults.passed_over import read_passed_over
from lctrain.launch.process import Process
from lctrain.launch.ranks import run_ranks
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_metrics
from lctrain.train import train

KEPT = ("step", "loss", "grad_norm", "lr", "digest", "consumed", "passed_over", "skipped")


def disturbed(rank: int, world_size: int, config: TrainConfig, spoiled: int | None) -> int:
    """Train with the loss of one step (from 1 on) reported as not finite, and its gradients not finite indeed."""

    def make(*arguments):
        engine = make_engine(*arguments)
        backward = engine.backward

        def spoil(batch, targets):
            result = backward(batch, targets)
            if batch.step + 1 != spoiled:
                return result
            for model in engine.models():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(math.nan)
            return dataclasses.replace(result, loss=math.nan, problem="loss nan")

        engine.backward = spoil
        return engine

    lctrain.train.make_engine = make
    torch.set_num_threads(1)
    try:
        return train(config, Process(rank, world_size, rank, world_size))
    finally:
        lctrain.train.make_engine = make_engine


def megatron(**settings) -> EngineConfig:
    return EngineConfig(name="megatron", **settings)


def deepspeed(zero: int) -> EngineConfig:
    return EngineConfig(name="deepspeed", zero=zero)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("engine", "grid"),
    [
        pytest.param(EngineConfig(data_parallel="fsdp"), {"cp": 2}, id="torch, fsdp", marks=slow),
        pytest.param(megatron(), {"tp": 2}, id="megatron, tp", marks=slow),
        pytest.param(megatron(dtype="bf16"), {"pp": 2}, id="megatron, pp"),
        pytest.param(megatron(), {"cp": 2}, id="megatron, cp"),
        pytest.param(deepspeed(0), {"tp": 2}, id="deepspeed, zero 0, tp", marks=slow),
        pytest.param(deepspeed(1), {"pp": 2}, id="deepspeed, zero 1, pp"),
        pytest.param(deepspeed(2), {"cp": 2}, id="deepspeed, zero 2", marks=slow),
        pytest.param(deepspeed(3), {"cp": 2}, id="deepspeed, zero 3", marks=slow),
    ],
)
def test_the_run_that_went_back_is_the_one_that_left_it_out(make_config, engine, grid):
    for package in {engine.name} - {"torch"}:
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    config = make_config(steps=5, non_finite="rollback", checkpoint={"asynchronous": True})
    attention = config.model.attention.model_copy(update={"n_kv_heads": 2})
    model = config.model.model_copy(update={"pattern": "*-*-", "vocab_size": 258, "attention": attention})
    config = config.model_copy(update={"engine": engine, "model": model, "parallel": ParallelConfig(**grid)})
    run = RunDir(config.run_dir)
    assert run_ranks(disturbed, 2, config, 4) == [0, 0]
    (entry,) = read_passed_over(run.passed_over)
    assert (entry.step, entry.returned_to) == (4, 2)
    went_back = [{key: record[key] for key in KEPT if key in record} for record in read_metrics(run.metrics)]
    assert [record.get("passed_over", False) for record in went_back] == [False, False, False, True, False]
    assert not any(check.wrong for check in audit(read_history(config.run_dir)))

    shutil.rmtree(run.checkpoints)
    run.metrics.unlink()
    assert run_ranks(disturbed, 2, config, None) == [0, 0]
    left_out = [{key: record[key] for key in KEPT if key in record} for record in read_metrics(run.metrics)]
    assert left_out == went_back
