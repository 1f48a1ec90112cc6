"""The loader's threads make the plans of a batch's attention; a step makes none, whatever the engine, and can if it has to."""

from __future__ import annotations

import dataclasses
import threading
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch

from lctrain.attention_plans import make_preparation
from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.data.loader import make_loader
from lctrain.engines.base import train_step
from lctrain.engines.make import make_engine
from lctrain.launch.ranks import run_ranks
from lctrain.parallel import plan
from lctrain.parallel.deal import make_layout
from lctrain.verify.layout.samples import MadeSamples

CPU = torch.device("cpu")
BATCHES = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """What a run differs in."""

    processes: int
    attention: str = "ring"
    layout: str = "zigzag"
    ulysses: int | None = None
    nesting: str = "inner"
    n_kv_heads: int = 2
    travel: str = "auto"
    engine: str = "torch"
    tp: int = 1
    micro_batch: int = 1
    checkpointing: str = "none"

    def config(self) -> TrainConfig:
        """Full, windowed and latent attention."""
        latent = LatentAttentionConfig(
            n_heads=4, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, travel=self.travel
        )
        return TrainConfig(
            run_dir="unused",
            model=ModelConfig(
                pattern="*W+-",
                d_model=32,
                vocab_size=64,
                attention=AttentionConfig(n_heads=4, n_kv_heads=self.n_kv_heads, window=20),
                latent_attention=latent,
                mlp=MlpConfig(d_ff=32),
            ),
            data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
            parallel=ParallelConfig(
                cp=self.processes // self.tp,
                tp=self.tp,
                attention=self.attention,
                layout=self.layout,
                ulysses=self.ulysses,
                nesting=self.nesting,
            ),
            engine=EngineConfig(name=self.engine, device="cpu", activation_checkpointing=self.checkpointing),
            trainer=TrainerConfig(seq_len=101, global_batch=2, micro_batch=self.micro_batch),
            launcher=LauncherConfig(processes=self.processes),
        )


class Builds:
    """Counts plans that are made while it is active, in the loader's threads and in this one."""

    def __init__(self) -> None:
        self.ahead, self.late = 0, 0

    def __enter__(self) -> Builds:
        build = plan._build

        def counted(*key):
            if threading.current_thread().name.startswith("loader-"):
                self.ahead += 1
            else:
                self.late += 1
            return build(*key)

        self._patch = patch.object(plan, "_build", counted)
        self._patch.start()
        return self

    def __exit__(self, *_) -> None:
        self._patch.stop()


def train_and_evaluate(rank: int, world_size: int, case: Case, spoil: str) -> tuple[Builds, Builds, list[float]]:
    """Plans made for steps and for an evaluation, and all losses. spoil: what becomes of the prepared plans."""
    config = case.config()
    mesh = config.mesh(rank, world_size)
    engine = make_engine(config, mesh, mesh.make_groups(), CPU)
    samples = MadeSamples(0, config.trainer.seq_len, config.model.vocab_size)
    targets = BATCHES * config.trainer.seq_len  # need not be right here
    losses = []
    plan.make_plan.cache_clear()
    with Builds() as steps, make_loader(config, mesh, samples, 0, BATCHES) as loader:
        for batch in loader:
            if spoil == "missing":
                batch = dataclasses.replace(
                    batch, micro_batches=tuple(dataclasses.replace(micro, plans=()) for micro in batch.micro_batches)
                )
                plan.make_plan.cache_clear()
            losses.append(train_step(engine, batch, targets, 1e-3).loss)
    plan.make_plan.cache_clear()
    with Builds() as evaluation, make_loader(config, mesh, samples, 10, 11, gradients=False) as loader:
        losses.append(engine.evaluate(micro for batch in loader for micro in batch.micro_batches))
    steps._patch = evaluation._patch = None
    return steps, evaluation, losses


def found(case: Case, spoil: str = "") -> list[tuple[Builds, Builds, list[float]]]:
    return run_ranks(train_and_evaluate, case.processes, case, spoil)


CASES = [
    Case(1),
    Case(2, layout="balanced", micro_batch=2),
    Case(4, "token_ring", layout="striped", checkpointing="layer"),
    Case(4, "usp", ulysses=2, nesting="outer", travel="heads"),
    Case(4, "ulysses", n_kv_heads=1, travel="latent"),
    Case(3, "ulysses", layout="balanced"),
    Case(3, "bidirectional_ring", travel="heads"),
    Case(4, "all_gather", engine="megatron", tp=2, n_kv_heads=1),
    Case(2, "double_ring", engine="deepspeed"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_finds_its_plans(case: Case) -> None:
    if case.engine != "torch" and find_spec({"megatron": "megatron.core"}.get(case.engine, case.engine)) is None:
        pytest.skip(f"needs {case.engine}")
    for steps, evaluation, _ in found(case):
        assert (steps.late, evaluation.late) == (0, 0)
        assert steps.ahead > 0
        assert 0 < evaluation.ahead <= 3 * 2 // case.micro_batch, "three kinds of layers, forward only"


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_a_step_without_plans_makes_its_own(case: Case) -> None:
    for (_, _, losses), (steps, _, same) in zip(found(case), found(case, "missing"), strict=True):
        assert steps.late > 0
        assert same == losses


def test_plans_live_as_long_as_their_batch() -> None:
    config = Case(2).config()
    prepare = make_preparation(config, config.mesh(0, 2), CPU)
    micro = [prepare(layout(config, borders), (borders,)) for borders in ((0, 7, 101), (0, 50, 90))]
    plan.make_plan.cache_clear()
    assert len(plan._held) == 2 * 3 * 2, "two batches, three kinds of layers, two directions"
    del micro[0]
    assert len(plan._held) == 3 * 2


def layout(config: TrainConfig, borders: tuple[int, ...]):
    return make_layout(config.parallel.layout, 2, config.trainer.seq_len, (borders,))
