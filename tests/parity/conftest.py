"""Training of one small model on any grid of processes, in fp32 or in fp64, for comparison with one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.optim import OptimConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.data.batch import DocumentSpan, MicroBatch, StepBatch
from lctrain.engines import torch_engine
from lctrain.engines.base import StepResult, train_step
from lctrain.engines.torch_engine import TorchEngine
from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.models.model import LanguageModel
from lctrain.models.parallel import ModelParallel
from lctrain.parallel.deal import make_layout
from lctrain.parallel.layout import IGNORE, count_targets, document_positions, shift_labels
from lctrain.parallel.mesh import ProcessMesh

VOCAB = 61


@dataclasses.dataclass(frozen=True)
class Setup:
    """What runs differ in. All but tie, sinks, double, length, clip_norm and lr may differ between two that must agree."""

    cp: int = 1
    dp: int = 1
    attention: str = "ring"
    layout: str = "zigzag"
    data_parallel: str = "ddp"
    micro_batch: int = 1
    ring: str = "ring"
    ulysses: int | None = None
    nesting: str = "inner"
    tie: bool = False
    sinks: bool = False
    checkpointing: str = "none"
    double: bool = False
    length: int = 1000
    clip_norm: float = 0.5
    lr: float = 1e-3

    def config(self) -> TrainConfig:
        """Grouped-query attention in full and windowed layers, biases and QK-norm."""
        processes = self.dp * self.cp
        return TrainConfig(
            run_dir="unused",
            model=ModelConfig(
                pattern="*-W-",
                d_model=32,
                vocab_size=VOCAB,
                tie_embeddings=self.tie,
                attention=AttentionConfig(n_heads=4, n_kv_heads=2, window=20, qk_norm=True, bias=True, sinks=self.sinks),
                mlp=MlpConfig(d_ff=48),
            ),
            data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
            parallel=ParallelConfig(
                cp=self.cp,
                attention=self.attention,
                layout=self.layout,
                ring=self.ring,
                ulysses=self.ulysses,
                nesting=self.nesting,
            ),
            engine=EngineConfig(data_parallel=self.data_parallel, activation_checkpointing=self.checkpointing, device="cpu"),
            optim=OptimConfig(clip_norm=self.clip_norm),
            trainer=TrainerConfig(global_batch=6, micro_batch=self.micro_batch, z_loss=1e-4, loss_chunk=300),
            launcher=LauncherConfig(processes=processes),
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """steps: result of each. gradients: of the first step, after clipping. weights: after the last step."""

    steps: list[StepResult]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def packed_rows(step: int, length: int) -> Iterator[tuple[Tensor, tuple[int, ...], int | None]]:
    """Six rows of a global batch: tokens, document borders and the token that continues the last document, if any.

    One long document, several, one-token ones, padding, and a row that is almost all padding. Within a document tokens count
    up in steps of a size of its own, with mistakes, so that there is something to learn.
    """
    cuts = ((30, 100, length), (length,), (length // 2,), (1, 2, length - 1), (length // 3, length // 3 + 1, length), (7,))
    generator = torch.Generator().manual_seed(step)
    for row, ends in enumerate(cuts):
        borders, tokens = (0, *ends), torch.zeros(length, dtype=torch.int64)
        for start, end in zip(borders, ends, strict=False):
            first, stride = torch.randint(1, VOCAB, (2,), generator=generator).tolist()
            tokens[start:end] = (first + (stride % 3 + 1) * torch.arange(end - start)) % VOCAB
        mistakes = torch.rand(length, generator=generator) < 0.1
        tokens[mistakes] = torch.randint(0, VOCAB, (length,), generator=generator)[mistakes]
        yield tokens, borders, (3 if row in (1, 4) else None)


def make_batch(setup: Setup, mesh: ProcessMesh, step: int, change: Callable[[int, Tensor], None] | None = None) -> StepBatch:
    """This rank's share of a step; `change(sample, tokens)` may alter a row in place."""
    rows = list(packed_rows(step, setup.length))
    micro_batches, size = [], setup.micro_batch
    for first in range(mesh.dp_rank * size, len(rows), mesh.dp * size):
        samples = range(first, first + size)
        if change is not None:
            for sample in samples:
                change(sample, rows[sample][0])
        tokens = torch.stack([rows[sample][0] for sample in samples])
        borders = tuple(rows[sample][1] for sample in samples)
        labels = shift_labels(tokens, borders, [rows[sample][2] for sample in samples])
        layout = make_layout(setup.layout, mesh.cp, setup.length, borders)
        tokens, shifted, positions = (
            layout.shard(x, mesh.cp_rank, 1, pad)
            for x, pad in ((tokens, 0), (labels, IGNORE), (document_positions(borders, setup.length), 0))
        )
        spans = tuple(
            tuple(DocumentSpan(0, 100 * sample + i, 0) for i in range(len(rows[sample][1]) - 1)) for sample in samples
        )
        micro_batches.append(
            MicroBatch(tokens, shifted, positions, borders, layout, count_targets(labels), tuple(samples), spans)
        )
    return StepBatch(step, 6 * step, tuple(micro_batches), 0)


def make_engine(setup: Setup, rank: int) -> TorchEngine:
    """Collective. In double, weights, arithmetic, gradients and optimizer state are all fp64."""
    config = setup.config()
    mesh = ProcessMesh(rank, setup.dp, setup.cp)

    def build_double(config: TrainConfig, parallel: ModelParallel) -> LanguageModel:
        with torch.device("meta"):
            checkpointing = config.engine.activation_checkpointing == "layer"
            return LanguageModel(config.model, torch.float64, checkpointing, parallel).double()

    build = build_double if setup.double else torch_engine.build_model
    with patch.object(torch_engine, "build_model", build):
        return TorchEngine(config, mesh, mesh.make_groups(), torch.device("cpu"))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def count_all_targets(batch: StepBatch, mesh: ProcessMesh) -> int:
    targets = torch.tensor(sum(micro.targets for micro in batch.micro_batches) * (mesh.cp_rank == 0))
    if mesh.size > 1:
        dist.all_reduce(targets)
    return int(targets)


def train_steps(rank: int, world_size: int, setup: Setup, steps: int) -> Outcome:
    """Some steps on this rank; gradients and weights come back from rank 0 alone."""
    engine = make_engine(setup, rank)
    gradients: dict[str, Tensor] = {}

    def keep_gradients(*_: Any) -> None:
        if not gradients:
            gradients.update({name: whole(p.grad) for name, p in engine.model.named_parameters()})

    engine.optimizer.register_step_pre_hook(keep_gradients)
    results = []
    for step in range(steps):
        batch = make_batch(setup, engine.mesh, step)
        results.append(train_step(engine, batch, count_all_targets(batch, engine.mesh), setup.lr))
    weights = {name: whole(parameter) for name, parameter in engine.model.named_parameters()}
    return Outcome(results, gradients, weights) if rank == 0 else Outcome(results, {}, {})


@pytest.fixture(scope="session")
def train() -> Callable[..., Outcome]:
    """train(setup, steps): the run's outcome, which is equal on all ranks; runs of one process are remembered."""
    remembered: dict[tuple[Setup, int], Outcome] = {}

    def run(setup: Setup, steps: int) -> Outcome:
        if (setup, steps) in remembered:
            return remembered[setup, steps]
        outcomes = run_ranks(train_steps, setup.dp * setup.cp, setup, steps)
        assert all(outcome.steps == outcomes[0].steps for outcome in outcomes), "ranks report different losses or norms"
        if setup.dp * setup.cp == 1:
            remembered[setup, steps] = outcomes[0]
        return outcomes[0]

    return run


@pytest.fixture(scope="session")
def make_setup() -> type[Setup]:
    return Setup


@pytest.fixture(scope="session")
def world() -> dict[str, Callable]:
    """The functions of this file for tests that run their own code on ranks."""
    return {"make_engine": make_engine, "make_batch": make_batch, "count_all_targets": count_all_targets}


@pytest.fixture(scope="session", autouse=True)
def _end_ranks() -> Iterator[None]:
    yield
    close_pools()
