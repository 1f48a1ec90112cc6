"""Planned weights, gradients and optimizer state against Engine.memory() of real engines after a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.data.batch import DocumentSpan, MicroBatch, StepBatch
from lctrain.engines.base import train_step
from lctrain.engines.deepspeed import engine as _imported_before_ranks_are_forked  # noqa: F401
from lctrain.engines.make import make_engine
from lctrain.engines.megatron import engine as _as_well  # noqa: F401
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.deal import make_layout
from lctrain.plan.static import static_memory
from tests.mixers import MIXERS

LENGTH = 32
GLOBAL_BATCH = 12


def config_of(engine: str = "torch", pattern: str = "*-M-", tie: bool = False, **settings: Any) -> TrainConfig:
    """settings: fields of `parallel` and of `engine`."""
    parallel = {name: settings.pop(name) for name in list(settings) if name in ParallelConfig.model_fields}
    return TrainConfig(
        run_dir="unused",
        model=ModelConfig(
            pattern=pattern,
            d_model=32,
            vocab_size=61,
            tie_embeddings=tie,
            attention=AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm=True, bias=True, sinks=True),
            mlp=MlpConfig(d_ff=44),
            mamba=MIXERS["mamba"],
            moe=MoeConfig(n_experts=4, d_ff=24, shared_d_ff=16, balance=BalanceConfig(bias_rate=1e-3)),
        ),
        data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
        parallel=ParallelConfig(**{"dp": 1, "cp": 1, **parallel}),
        engine=EngineConfig(name=engine, device="cpu", **settings),
        trainer=TrainerConfig(seq_len=LENGTH, global_batch=GLOBAL_BATCH),
    )


def memory_after_a_step(rank: int, size: int, config: TrainConfig) -> dict[str, int]:
    mesh = config.mesh(rank, size)
    engine = make_engine(config, mesh, mesh.make_groups(), torch.device("cpu"))
    borders = ((0, LENGTH),)
    layout = make_layout("zigzag", mesh.cp, LENGTH, borders)
    tokens = torch.arange(LENGTH)[None]
    own = layout.shard(tokens, mesh.cp_rank, 1, 0)
    micro = MicroBatch(own, own, own, borders, layout, LENGTH, (0,), ((DocumentSpan(0, 0, 0),),))
    passes = GLOBAL_BATCH // mesh.dp
    train_step(engine, StepBatch(0, 0, (micro,) * passes, 0), GLOBAL_BATCH * LENGTH, 1e-3)
    return engine.memory()


EXPERTS = {"dp": 2, "cp": 2, "ep": 2, "pattern": "*E"}
SUB_GROUPS = {"zero_optimization": {"sub_group_size": 1000}}
CASES: list[dict[str, Any]] = [
    {},
    {"dp": 2},
    {"data_parallel": "fsdp", "dp": 2},
    {"data_parallel": "fsdp", "dp": 3, "tie": True},
    EXPERTS,
    {"data_parallel": "fsdp", **EXPERTS},
    {"engine": "deepspeed", "zero": 0, "dp": 2},
    {"engine": "deepspeed", "zero": 1, "dp": 3},
    # vectors whose sum is no multiple of what groups are padded to
    {"engine": "deepspeed", "zero": 1, "dp": 2, "cp": 2, "pattern": "*-"},
    {"engine": "deepspeed", "zero": 2, "cp": 2, "tp": 2},
    {"engine": "deepspeed", "zero": 3, "dp": 3},
    {"engine": "deepspeed", "zero": 3, "dp": 2, "deepspeed_config": SUB_GROUPS},
    {"engine": "deepspeed", "zero": 3, **EXPERTS},
    {"engine": "deepspeed", "zero": 1, "cp": 2, "ep": 2, "pattern": "*E"},
    {"engine": "deepspeed", "zero": 1, "pp": 2, "dp": 2, "tie": True},
    {"engine": "megatron", "tp": 2},
    {"engine": "megatron", "tp": 2, "dp": 2, "dtype": "bf16"},
    {"engine": "megatron", "dp": 3, "distributed_optimizer": False, "dtype": "bf16"},
    {"engine": "megatron", "pp": 2, "dp": 2, "tie": True, "dtype": "bf16"},
    {"engine": "megatron", "pp": 2, "virtual_stages": 2},
    {"engine": "megatron", "tp": 2, "dp": 2, "ep": 2, "etp": 2, "pattern": "*E", "dtype": "bf16"},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda case: ",".join(f"{k}={v}" for k, v in case.items()) or "one")
def test_equal_to_engines(settings):
    config = config_of(**settings)
    real = run_ranks(memory_after_a_step, config.processes, config)
    stages = config.parallel.pp
    for stage in range(stages):
        assert static_memory(config, stage)._asdict() == real[stage * config.processes // stages]
