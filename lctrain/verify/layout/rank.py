"""What one rank does to prove a layout: a few steps, with everything kept that a single process would have too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.checkpoint.store import CheckpointStore
from lctrain.config.schema import TrainConfig
from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.data.loader import make_loader
from lctrain.engines.base import Engine, StepResult, train_step
from lctrain.engines.make import make_engine
from lctrain.models.moe.rankings import Rankings, Recorded
from lctrain.parallel.mesh import ProcessMesh
from lctrain.resume import training_state
from lctrain.verify.layout.samples import MadeSamples

CPU = torch.device("cpu")
TRAINING = "training"
"""Part of the rankings: every step has samples of its own."""


@dataclasses.dataclass
class Findings:
    """What rank 0 brings home.

    steps: results of all steps. gradients: whole, of the first. losses: sample -> its token losses [seq_len] before the first
    step; changed: the same with one document's tokens changed. repeated: the last step's result once more, after the state
    saved before it was loaded again. checkpoint: folder with the state after the last step. rankings: of experts, by one
    process; nothing where they were pinned.
    """

    steps: list[StepResult]
    gradients: dict[str, Tensor]
    losses: dict[int, Tensor]
    changed: dict[int, Tensor]
    repeated: StepResult
    checkpoint: Path
    rankings: Recorded = dataclasses.field(default_factory=dict)


def prove(
    rank: int, world_size: int, config: TrainConfig, changed: tuple[int, int], folder: str, recorded: Recorded | None
) -> Findings | None:
    """Train as `config` says on made samples; Findings on rank 0. Collective over the default group of `world_size`.

    recorded: how one process ranked experts, for a layout.
    """
    mesh = config.mesh(rank, world_size)
    engine, rankings = _engine(config, mesh, recorded)
    usual, other = (
        MadeSamples(config.trainer.seed, config.trainer.seq_len, config.model.vocab_size, which) for which in (None, changed)
    )
    rankings.part = "losses"
    losses = _token_losses(engine, mesh, _batches(config, mesh, usual, 0, 1))
    rankings.part = "losses, a document changed"
    with_change = _token_losses(engine, mesh, _batches(config, mesh, other, 0, 1))
    rankings.part = TRAINING
    store = CheckpointStore(Path(folder) / "checkpoints", keep_last=config.trainer.steps + 1)
    gradients: dict[str, Tensor] = {}
    results = []
    last = config.trainer.steps - 1
    for batch in _batches(config, mesh, usual, 0, last + 1):
        targets = _all_targets(batch, mesh)
        if batch.step == last:
            before_last = store.save(last, training_state(engine, rank), {})
        if batch.step == 0:
            results.append(engine.backward(batch, targets))
            gradients = engine.gradients()
            engine.update(config.optim.lr)
        else:
            results.append(train_step(engine, batch, targets, config.optim.lr))
    after = store.save(last + 1, training_state(engine, rank), {})
    repeated = resume_and_step(engine, store, before_last, config, mesh, usual)
    return Findings(results, gradients, losses, with_change, repeated, after, rankings.recorded()) if rank == 0 else None


def resume_and_step(
    engine: Engine, store: CheckpointStore, checkpoint: Path, config: TrainConfig, mesh: ProcessMesh, samples: MadeSamples
) -> StepResult:
    """The last step again from the state saved before it."""
    state = training_state(engine, mesh.rank)
    store.load(checkpoint, state)
    engine.load_state(state)
    (batch,) = _batches(config, mesh, samples, config.trainer.steps - 1, config.trainer.steps)
    return train_step(engine, batch, _all_targets(batch, mesh), config.optim.lr)


def load_checkpoint(
    rank: int, world_size: int, config: TrainConfig, checkpoint: Path, recorded: Recorded
) -> tuple[dict[str, Any], StepResult]:
    """One process: the weights and moments of a checkpoint, whole, and the last step made from the one before it."""
    mesh = config.mesh(rank, world_size)
    engine, rankings = _engine(config, mesh, recorded)
    rankings.part = TRAINING
    store = CheckpointStore(checkpoint.parent, keep_last=config.trainer.steps + 1)
    state = training_state(engine, rank)
    store.load(checkpoint, state)
    whole = {f"weight {name}": tensor.clone() for name, tensor in state["model"].items()}
    for name, moments in state["optimizer"]["state"].items():
        whole |= {f"{key} {name}": value.clone() for key, value in moments.items() if key.startswith("exp_avg")}
    before = checkpoint.parent / checkpoint.name.replace(f"{config.trainer.steps:08d}", f"{config.trainer.steps - 1:08d}")
    samples = MadeSamples(config.trainer.seed, config.trainer.seq_len, config.model.vocab_size)
    return whole, resume_and_step(engine, store, before, config, mesh, samples)


def _engine(config: TrainConfig, mesh: ProcessMesh, recorded: Recorded | None) -> tuple[Engine, Rankings]:
    """An engine whose routers record their rankings, or keep to those recorded."""
    engine, rankings = make_engine(config, mesh, mesh.make_groups(), CPU), Rankings(recorded)
    for model in engine.models():
        rankings.attach(model)
    return engine, rankings


def _batches(config: TrainConfig, mesh: ProcessMesh, samples: MadeSamples, start: int, end: int) -> Iterator[StepBatch]:
    with make_loader(config, mesh, samples, start, end) as loader:
        yield from loader


def _all_targets(batch: StepBatch, mesh: ProcessMesh) -> int:
    targets = torch.tensor(sum(micro.targets for micro in batch.micro_batches) * mesh.counts_rows)
    if mesh.size > 1:
        dist.all_reduce(targets)
    return int(targets)


def _token_losses(engine: Engine, mesh: ProcessMesh, batches: Iterator[StepBatch]) -> dict[int, Tensor]:
    """Sample -> losses of its tokens in their global order, on rank 0."""
    micro_batches: list[MicroBatch] = [micro for batch in batches for micro in batch.micro_batches]
    mine = []
    if found := engine.token_losses(micro_batches):
        for micro, losses in zip(micro_batches, found, strict=True):
            mine += [(sample, mesh.cp_rank, micro.layout, row) for sample, row in zip(micro.samples, losses.cpu(), strict=True)]
    everyone: list[Any] = [mine]
    if mesh.size > 1:
        everyone = [None] * mesh.size
        dist.all_gather_object(everyone, mine)
    shares: dict[int, dict[int, Any]] = {}
    for sample, cp_rank, layout, row in (entry for entries in everyone for entry in entries):
        shares.setdefault(sample, {})[cp_rank] = (layout, row)
    return {
        sample: parts[0][0].unshard([parts[cp_rank][1] for cp_rank in range(mesh.cp)], 0) for sample, parts in shares.items()
    }
