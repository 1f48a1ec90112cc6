"""Planned weights, gradients and optimizer state against Engine.memory() of real engines after a step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lctrain.config.launcher import LauncherConfig
from lctrain.config.mamba import MambaConfig
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

LENGTH = 32
GLOBAL_BATCH = 12


@dataclasses.dataclass(frozen=True)
class Case:
    engine: str = "torch"
    dp: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    virtual_stages: int = 1
    data_parallel: str = "ddp"
    zero: int | None = None
    distributed_optimizer: bool = True
    dtype: str = "fp32"
    pattern: str = "*-M-"
    tie: bool = False
    sub_group: int | None = None

    @property
    def size(self) -> int:
        return self.dp * self.cp * self.tp * self.pp

    def config(self) -> TrainConfig:
        return TrainConfig(
            run_dir="unused",
            model=ModelConfig(
                pattern=self.pattern,
                d_model=32,
                vocab_size=61,
                tie_embeddings=self.tie,
                attention=AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm=True, bias=True, sinks=True),
                mlp=MlpConfig(d_ff=44),
                mamba=MambaConfig(head_dim=8, d_state=8, n_groups=2, chunk=16),
                moe=MoeConfig(n_experts=4, d_ff=24, shared_d_ff=16, balance=BalanceConfig(bias_rate=1e-3)),
            ),
            data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
            parallel=ParallelConfig(
                dp=self.dp,
                cp=self.cp,
                tp=self.tp,
                pp=self.pp,
                ep=self.ep,
                etp=self.etp,
                virtual_stages=self.virtual_stages,
            ),
            engine=EngineConfig(
                name=self.engine,
                data_parallel=self.data_parallel,
                zero=self.zero,
                deepspeed_config=None if self.sub_group is None else {"zero_optimization": {"sub_group_size": self.sub_group}},
                distributed_optimizer=self.distributed_optimizer,
                dtype=self.dtype,
                device="cpu",
            ),
            trainer=TrainerConfig(seq_len=LENGTH, global_batch=GLOBAL_BATCH),
            launcher=LauncherConfig(processes=self.size),
        )


def memory_after_a_step(rank: int, size: int, case: Case) -> dict[str, int]:
    config = case.config()
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


CASES = [
    Case(),
    Case(dp=2),
    Case(data_parallel="fsdp", dp=2),
    Case(data_parallel="fsdp", dp=3, tie=True),
    Case(dp=2, cp=2, ep=2, pattern="*E"),
    Case(data_parallel="fsdp", dp=2, cp=2, ep=2, pattern="*E"),
    Case("deepspeed", zero=0, dp=2),
    Case("deepspeed", zero=1, dp=3),
    Case("deepspeed", zero=1, dp=2, cp=2, pattern="*-"),  # vectors whose sum is no multiple of what groups are padded to
    Case("deepspeed", zero=2, cp=2, tp=2),
    Case("deepspeed", zero=3, dp=3),
    Case("deepspeed", zero=3, dp=2, sub_group=1000),
    Case("deepspeed", zero=3, cp=2, dp=2, ep=2, pattern="*E"),
    Case("deepspeed", zero=1, cp=2, ep=2, pattern="*E"),
    Case("deepspeed", zero=1, pp=2, dp=2, tie=True),
    Case("megatron", tp=2),
    Case("megatron", tp=2, dp=2, dtype="bf16"),
    Case("megatron", dp=3, distributed_optimizer=False, dtype="bf16"),
    Case("megatron", pp=2, dp=2, tie=True, dtype="bf16"),
    Case("megatron", pp=2, virtual_stages=2),
    Case("megatron", tp=2, dp=2, ep=2, etp=2, pattern="*E", dtype="bf16"),
]


def short(case: Case) -> str:
    default = Case()
    return ",".join(f"{k}={v}" for k, v in dataclasses.asdict(case).items() if v != getattr(default, k)) or "one"


@pytest.mark.parametrize("case", CASES, ids=short)
def test_equal_to_engines(case):
    real = run_ranks(memory_after_a_step, case.size, case)
    for stage in range(case.pp):
        assert static_memory(case.config(), stage)._asdict() == real[stage * case.size // case.pp]
