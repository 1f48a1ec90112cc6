"""The training loop: what one rank of a run does from its first collective to its last."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from lctrain.attention_choice import announce_choice
from lctrain.audit.history import note_discarded
from lctrain.checkpoint.store import CheckpointStore
from lctrain.config.schema import TrainConfig
from lctrain.data.batch import StepBatch
from lctrain.data.digest import digest_text
from lctrain.data.loader import make_loader, shared_window
from lctrain.data.samples import SampleSource
from lctrain.devices import DTYPES, choose_device, peak_flops, peak_memory_mb
from lctrain.engines.base import Engine, train_step
from lctrain.engines.make import make_engine
from lctrain.errors import UserError
from lctrain.launch.grace import GracePeriod
from lctrain.launch.process import Process
from lctrain.launch.signals import StopRequest
from lctrain.models.build import build_model
from lctrain.models.model import LanguageModel
from lctrain.optim import learning_rate
from lctrain.parallel.balance import rank_entries
from lctrain.parallel.mesh import ProcessMesh
from lctrain.resume import checkpoint_meta, resume, training_state
from lctrain.run_dir import RunDir
from lctrain.tracking.tracker import Tracker, open_tracker


def train(config: TrainConfig, process: Process) -> int:
    """Train as `config` says, in an initialised default process group; returns 0 for a finished or gracefully stopped run.

    Raises UserError, on every rank, for what the user can correct.
    """
    with StopRequest() as stop:
        mesh = config.mesh(process.rank, process.world_size)
        device = choose_device(config.engine.device, process.local_rank, process.local_size)
        engine = make_engine(config, mesh, mesh.make_groups(), device)
        run = RunDir(config.run_dir)
        described = build_model(config)
        store = CheckpointStore(run.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_every)
        start, checkpoint = resume(config, store, engine, mesh.rank)
        if mesh.rank == 0:
            note_discarded(run, start)
        tracker = open_tracker(config, mesh.rank, start)
        store.say = tracker.message
        status = 1
        try:
            _announce(config, mesh, described, start, checkpoint, tracker)
            announce_choice(config, device, tracker)
            if start < config.trainer.steps:
                _loop(config, mesh, engine, described, device, store, tracker, start, stop)
            status = 0
        finally:
            tracker.close(status)
        if mesh.rank == 0 and config.tracking.plot:
            _plot(run)
    return 0


def _loop(
    config: TrainConfig,
    mesh: ProcessMesh,
    engine: Engine,
    described: LanguageModel,
    device: torch.device,
    store: CheckpointStore,
    tracker: Tracker,
    start: int,
    stop: StopRequest,
) -> None:
    trainer, saved = config.trainer, start
    peak, peak_source = peak_flops(device, DTYPES[config.engine.dtype])
    tracker.message(f"mfu 100% = {peak / 1e9:,.0f} GFLOP/s per process ({peak_source})")
    skipped_in_a_row = 0
    grace = GracePeriod(config.launcher)

    def save(step: int) -> None:
        nonlocal saved
        began = time.perf_counter()
        path = store.save(step, training_state(engine, mesh.rank), checkpoint_meta(config, step))
        seconds = time.perf_counter() - began
        tracker.event("checkpoint", step=step, checkpoint=str(path), seconds=round(seconds, 3))
        if warning := grace.saved(seconds):
            tracker.message(warning)
            tracker.event("grace", message=warning)
        saved = step

    source = SampleSource(config.data, trainer, config.model.vocab_size, "train")
    evaluation = SampleSource(config.data, trainer, config.model.vocab_size, "valid") if trainer.eval_every else None
    with make_loader(config, mesh, source, start, pin_memory=device.type == "cuda") as loader:
        began = time.perf_counter()
        for batch in loader:
            sums = _agree(config, batch, mesh, described, stop)
            grace.stop_checked()
            if sums["stop"]:
                name = stop.requested or "a stop signal on another rank"
                tracker.message(f"{name}: stopping after step {batch.step} of {trainer.steps}")
                tracker.event("stop", step=batch.step, signal=name)
                break
            lr = learning_rate(config.optim, batch.step, trainer.steps)
            result = train_step(engine, batch, sums["targets"], lr)
            step = batch.step + 1
            step_s = time.perf_counter() - began
            record: dict[str, Any] = {
                "step": step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "tokens_per_s": sums["tokens"] / step_s,
                "mfu": 3 * sums["flops"] / (step_s * mesh.size * peak),
                "step_s": step_s,
                "data_wait_s": loader.wait_s,
                "memory_mb": peak_memory_mb(device),
                "tokens": sums["tokens"],
                "targets": sums["targets"],
                "consumed": batch.consumed + trainer.global_batch,
                "digest": digest_text(sums["digest"]),
                **result.extra,
            }
            if mesh.cp > 1:
                record["cp_imbalance"] = sums["busiest"] / max(1, sums["entries"])
            if result.problem is None:
                skipped_in_a_row = 0
            else:
                skipped_in_a_row += 1
                record["skipped"] = True
                _handle_problem(config, step, result.problem, skipped_in_a_row, record, tracker)
            if evaluation is not None and (step % trainer.eval_every == 0 or step == trainer.steps):
                record["eval_loss"] = _evaluate(config, mesh, engine, device, evaluation)
            tracker.step(record)
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                save(step)
            began = time.perf_counter()  # evaluation and checkpoint do not count as the next step's time
        done = batch.step if sums["stop"] else trainer.steps
    if saved != done:
        save(done)
    if done == trainer.steps:
        tracker.event("end", step=done)


def _agree(
    config: TrainConfig, batch: StepBatch, mesh: ProcessMesh, described: LanguageModel, stop: StopRequest
) -> dict[str, int]:
    """Sums over the whole global batch, and whether any rank was asked to stop: equal on all ranks, one small all-reduce.

    entries: live score entries of attention; busiest: what they would be if every context-parallel rank had as many as the one
    with the most in its micro-batch, for which the others wait.
    """
    first = mesh.counts_rows  # every rank that shares a row knows all of it: one of them counts
    window = shared_window(config)
    work = [rank_entries(micro.layout, micro.borders, window=window) for micro in batch.micro_batches]
    names = {
        "targets": sum(micro.targets for micro in batch.micro_batches) * first,
        "tokens": sum(borders[-1] for micro in batch.micro_batches for borders in micro.borders) * first,
        "flops": sum(described.flops(micro.borders) for micro in batch.micro_batches) * first,
        "entries": sum(map(sum, work)) * first,
        "busiest": sum(map(max, work)) * mesh.cp * first,
        "digest": batch.digest * first,
        "stop": int(stop.requested is not None),
    }
    sums = torch.tensor(list(names.values()), dtype=torch.int64)
    if mesh.size > 1:
        dist.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))


def _handle_problem(
    config: TrainConfig, step: int, problem: str, in_a_row: int, record: dict[str, Any], tracker: Tracker
) -> None:
    """Apply trainer.non_finite: return to go on without this update, or raise."""
    tracker.event("not_finite", step=step, problem=problem)
    if config.trainer.non_finite == "skip" and in_a_row <= config.trainer.max_skips:
        tracker.message(f"step {step}: {problem}; the update is skipped")
        return
    tracker.step(record)
    after = f" after {in_a_row - 1} skipped steps in a row (trainer.max_skips)" if in_a_row > 1 else ""
    raise UserError(f"step {step}: {problem}; stopped{after}, checkpoints stay as they were")


def _evaluate(config: TrainConfig, mesh: ProcessMesh, engine: Engine, device: torch.device, source: SampleSource) -> float:
    pin = device.type == "cuda"
    with make_loader(config, mesh, source, 0, config.trainer.eval_batches, pin) as batches:
        return engine.evaluate(micro for batch in batches for micro in batch.micro_batches)


def _announce(
    config: TrainConfig, mesh: ProcessMesh, described: LanguageModel, start: int, checkpoint: object, tracker: Tracker
) -> None:
    parameters = sum(parameter.numel() for parameter in described.parameters())
    if mesh.rank == 0:  # not before: a config that the resume has refused would stand beside checkpoints that it does not fit
        RunDir(config.run_dir).note_config(config)
    tracker.message(
        f"{config.model.name}: {parameters:,} parameters, pattern {config.model.pattern}, {config.engine.dtype};"
        f" {mesh.sizes}"
        f" ({config.parallel.layout}, {config.parallel.attention}); {config.trainer.global_batch} x {config.trainer.seq_len:,}"
        f" tokens a step; run directory {config.run_dir}"
    )
    if checkpoint is not None:
        tracker.message(f"continuing after step {start} from {checkpoint}")
        tracker.event("resume", step=start, checkpoint=str(checkpoint), world_size=mesh.size)
    else:
        tracker.event("start", world_size=mesh.size)
    if start >= config.trainer.steps:
        tracker.message(f"the run already has its trainer.steps={config.trainer.steps} steps; raise it to train on")


def _plot(run: RunDir) -> None:
    from lctrain.tracking.heatmap import plot_load
    from lctrain.tracking.plot import plot_loss

    for name, draw in (("loss curve", plot_loss), ("load of experts", plot_load)):
        try:
            if (path := draw(run)) is not None:
                print(f"{name}: {path}", flush=True)
        except (UserError, OSError) as error:  # nothing to draw, or a full disk: the run itself is done and saved
            print(f"no {name}: {error}", flush=True)
