"""Our contender in `lctrain bench step`: model, loss and engine exactly as `lctrain train` uses them on one process."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from lctrain.bench.documents import document_borders
from lctrain.bench.memory import peak_resident_mib, resident_mib
from lctrain.config.bench import StepBenchConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, TrainConfig, TrainerConfig
from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.devices import DTYPES, gemm_flops
from lctrain.engines.base import train_step
from lctrain.engines.torch_engine import TorchEngine
from lctrain.parallel.layout import SequenceLayout, count_targets, document_positions, shift_labels
from lctrain.parallel.mesh import ProcessMesh

CPU = torch.device("cpu")


class Step(NamedTuple):
    """One optimizer step: wall and CPU seconds, mean loss (nats) and gradient norm before the update."""

    seconds: float
    cpu_seconds: float
    loss: float
    grad_norm: float


class Ours:
    """TorchEngine on one process, fed with the same random tokens in every step.

    after_import: MiB resident when everything is imported and nothing built.
    """

    def __init__(self, config: StepBenchConfig, seq: int) -> None:
        self.after_import = resident_mib()
        self.dtype = DTYPES[config.dtype]
        self.train_config = train_config(config, seq)
        self.batch = random_batch(config, seq)
        mesh = ProcessMesh(0)
        self.engine = TorchEngine(self.train_config, mesh, mesh.make_groups(), CPU)

    def step(self) -> Step:
        """Forward, backward, clipping and update."""
        start, cpu = time.perf_counter(), time.process_time()
        result = train_step(self.engine, self.batch, self.batch.micro_batches[0].targets, self.train_config.optim.lr)
        return Step(time.perf_counter() - start, time.process_time() - cpu, result.loss, result.grad_norm)

    def memory(self) -> tuple[float, float]:
        """MiB resident after the imports, and at the peak."""
        return self.after_import, peak_resident_mib()

    def flops(self) -> int:
        """Of one step: forward once, backward twice that; recomputed activations do not count."""
        return 3 * self.engine.model.flops(self.batch.micro_batches[0].borders)

    def gemm_flops(self) -> float:
        """Rate of a matrix product with this process's threads, FLOP/s."""
        return gemm_flops(CPU, self.dtype)


def train_config(config: StepBenchConfig, seq: int) -> TrainConfig:
    """The part of a training run's settings that the engine reads; there is no corpus and no run directory."""
    return TrainConfig(
        run_dir="none",
        model=config.model,
        data=DataConfig(corpora=(CorpusConfig(prefix="none"),)),
        engine=EngineConfig(dtype=config.dtype, device="cpu", activation_checkpointing=config.activation_checkpointing),
        trainer=TrainerConfig(seq_len=seq, global_batch=config.batch, micro_batch=config.batch, seed=config.seed),
    )


def random_batch(config: StepBenchConfig, seq: int) -> StepBatch:
    """Uniformly random tokens in the documents that the benchmark asks for."""
    generator = torch.Generator().manual_seed(config.seed)
    tokens = torch.randint(config.model.vocab_size, (config.batch, seq), generator=generator)
    borders = (document_borders(config, seq),) * config.batch
    labels = shift_labels(tokens, borders, [None] * config.batch)
    micro = MicroBatch(
        tokens,
        labels,
        document_positions(borders, seq),
        borders,
        SequenceLayout("contiguous", 1, seq),
        count_targets(labels),
        samples=tuple(range(config.batch)),
        spans=((),) * config.batch,
    )
    return StepBatch(step=0, consumed=0, micro_batches=(micro,), digest=0)
