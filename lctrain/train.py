"""The training loop: what one rank of a run does from its first collective to its last."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lctrain.attention_choice import announce_choice
from lctrain.audit.history import note_discarded
from lctrain.checkpoint.background import Saver
from lctrain.checkpoint.store import CheckpointStore
from lctrain.config.schema import TrainConfig
from lctrain.data.batch import StepBatch
from lctrain.data.digest import digest_text
from lctrain.data.loader import make_loader, shared_window
from lctrain.data.samples import SampleSource
from lctrain.devices import DTYPES, choose_device, peak_flops, peak_memory_mb
from lctrain.engines.base import Engine, StepResult, train_step
from lctrain.engines.make import make_engine
from lctrain.faults.guard import GoBack, LossGuard
from lctrain.faults.replicas import check_replicas
from lctrain.launch.grace import GracePeriod
from lctrain.launch.process import Process
from lctrain.launch.signals import StopRequest
from lctrain.launch.watchdog import Watchdog
from lctrain.models.build import build_model
from lctrain.models.model import LanguageModel
from lctrain.optim import learning_rate
from lctrain.parallel.balance import rank_entries
from lctrain.parallel.mesh import ProcessMesh
from lctrain.probe.recall import RecallProbe
from lctrain.resume import checkpoint_meta, resume, training_state
from lctrain.run_dir import RunDir
from lctrain.tracking.pictures import draw_pictures
from lctrain.tracking.ranks import RankWatch
from lctrain.tracking.tracker import Tracker, open_tracker

SHOWN = 8
"""Changed settings that are told when a run continues."""
LEFT_OUT = StepResult(math.nan, math.nan, None)
"""Of a step whose batch the run leaves out."""


def train(config: TrainConfig, process: Process, watchdog: Watchdog | None = None) -> int:
    """Train as `config` says, in an initialised default process group; returns 0 for a finished or gracefully stopped run.

    Raises UserError, on every rank, for what the user can correct.
    """
    watchdog = watchdog or Watchdog(process.rank, process.world_size, 0, speak=False)
    with StopRequest() as stop:
        watchdog.phase("building the model")
        mesh = config.mesh(process.rank, process.world_size)
        device = choose_device(config.engine.device, process.local_rank, process.local_size)
        engine = make_engine(config, mesh, mesh.make_groups(), device)
        run = RunDir(config.run_dir)
        described = build_model(config)
        store = CheckpointStore(run.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_every)
        saver = Saver(store, config.checkpoint.asynchronous)
        watchdog.watch_layers()
        back: Path | None = None
        while True:
            try:
                _continue(config, mesh, engine, described, device, saver, stop, watchdog, back)
                break
            except GoBack as order:
                back = order.path
    return 0


def _continue(
    config: TrainConfig,
    mesh: ProcessMesh,
    engine: Engine,
    described: LanguageModel,
    device: torch.device,
    saver: Saver,
    stop: StopRequest,
    watchdog: Watchdog,
    back: Path | None,
) -> None:
    """Train from where config.resume says, or from the checkpoint `back`, to the end, or until GoBack."""
    run = RunDir(config.run_dir)
    watchdog.phase("loading")
    asked = config if back is None else config.model_copy(update={"resume": str(back)})
    saver.before_change()
    start, checkpoint = resume(asked, saver.store, engine, mesh.rank)
    guard = LossGuard(config, run, mesh.rank, start, checkpoint)
    if mesh.rank == 0:
        note_discarded(run, start)
    tracker = open_tracker(config, mesh.rank, start)
    saver.store.say = tracker.message
    status = 1
    try:
        _announce(config, mesh, described, start, checkpoint, tracker)
        announce_choice(config, device, tracker)
        if start < config.trainer.steps:
            _loop(config, mesh, engine, described, device, saver, guard, tracker, start, stop, watchdog)
        status = 0
        if mesh.rank == 0 and config.tracking.plot:
            watchdog.phase("drawing")
            draw_pictures(run, tracker.message)
    except GoBack:
        status = 0
        raise
    finally:
        tracker.close(status)


def _loop(
    config: TrainConfig,
    mesh: ProcessMesh,
    engine: Engine,
    described: LanguageModel,
    device: torch.device,
    saver: Saver,
    guard: LossGuard,
    tracker: Tracker,
    start: int,
    stop: StopRequest,
    watchdog: Watchdog,
) -> None:
    trainer, saved = config.trainer, start
    peak, peak_source = peak_flops(device, DTYPES[config.engine.dtype])
    tracker.message(f"mfu 100% = {peak / 1e9:,.0f} GFLOP/s per process ({peak_source})")
    grace = GracePeriod(config.launcher)
    ranks = RankWatch(config, mesh, engine, device)

    def save(step: int) -> None:
        nonlocal saved
        watchdog.phase("saving", step)
        began = time.perf_counter()
        meta = {**checkpoint_meta(config, step), **guard.meta()}
        saver.save(step, training_state(engine, mesh.rank), meta, began)
        saved = step
        note_saved()

    def note_saved() -> None:
        for done in saver.finished():
            guard.saved(done.step, done.path)
            waited = {"stall_s": round(done.stall_s, 3)} if saver.asynchronous else {}
            tracker.event("checkpoint", step=done.step, checkpoint=str(done.path), seconds=round(done.seconds, 3), **waited)
            if warning := grace.saved(done.seconds):
                tracker.message(warning)
                tracker.event("grace", message=warning)

    source = SampleSource(config.data, trainer, config.model.vocab_size, "train")
    held_out = None
    if trainer.eval_every or config.probe.every:
        held_out = SampleSource(config.data, trainer, config.model.vocab_size, "valid")
    probe = RecallProbe(config, mesh, engine, held_out) if held_out and config.probe.every else None
    if guard.needs_first_checkpoint:
        save(start)
    watchdog.phase("reading data", start + 1)
    with make_loader(config, mesh, source, start, device=device) as loader:
        began = time.perf_counter()
        for batch in loader:
            watchdog.phase("step", batch.step + 1)
            sums = _agree(config, batch, mesh, described, stop, saver)
            if sums["failed"]:
                saver.wait()  # raises on all ranks what went wrong with the checkpoint
            note_saved()
            grace.stop_checked()
            if sums["stop"]:
                name = stop.requested or "a stop signal on another rank"
                tracker.message(f"{name}: stopping after step {batch.step} of {trainer.steps}")
                tracker.event("stop", step=batch.step, signal=name)
                break
            lr = learning_rate(config.optim, batch.step, trainer.steps)
            step = batch.step + 1
            left_out = guard.leaves_out(step) is not None
            result = LEFT_OUT if left_out else train_step(engine, batch, sums["targets"], lr, guard.judge, saver.before_change)
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
                **ranks.step(step, step_s),
            }
            if mesh.cp > 1:
                record["cp_imbalance"] = sums["busiest"] / max(1, sums["entries"])
            if left_out:
                record["passed_over"] = record["skipped"] = True
            if result.problem is not None:
                saver.wait()  # the checkpoint to go back to, or to leave behind, is to be whole
                note_saved()
            guard.handle(step, result.problem, source, record, tracker)
            if held_out and trainer.eval_every and (step % trainer.eval_every == 0 or step == trainer.steps):
                watchdog.phase("evaluation", step)
                record["eval_loss"] = _evaluate(config, mesh, engine, device, held_out)
            if probe and probe.due(step):
                watchdog.phase("recall probe", step)
                record |= probe.run()
            tracker.step(record)
            if trainer.replica_check_every and step % trainer.replica_check_every == 0:
                watchdog.phase("comparing replicas", step)
                check_replicas(engine.state()["model"], step, step == trainer.replica_check_every, tracker)
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                save(step)
            watchdog.phase("reading data", step + 1)
            began = time.perf_counter()  # evaluation and checkpoint do not count as the next step's time
        done = batch.step if sums["stop"] else trainer.steps
    if saved != done:
        save(done)
    watchdog.phase("saving", done)
    saver.wait()
    note_saved()
    if done == trainer.steps:
        tracker.event("end", step=done)


def _agree(
    config: TrainConfig,
    batch: StepBatch,
    mesh: ProcessMesh,
    described: LanguageModel,
    stop: StopRequest,
    saver: Saver,
) -> dict[str, int]:
    """Sums over the whole global batch, and whether any rank was asked to stop or could not save: one small all-reduce.

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
        "failed": int(saver.failed),
    }
    sums = torch.tensor(list(names.values()), dtype=torch.int64)
    if mesh.size > 1:
        dist.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))


def _evaluate(config: TrainConfig, mesh: ProcessMesh, engine: Engine, device: torch.device, source: SampleSource) -> float:
    with make_loader(config, mesh, source, 0, config.trainer.eval_batches, device, gradients=False) as batches:
        return engine.evaluate(micro for batch in batches for micro in batch.micro_batches)


def _announce(
    config: TrainConfig, mesh: ProcessMesh, described: LanguageModel, start: int, checkpoint: object, tracker: Tracker
) -> None:
    parameters = sum(parameter.numel() for parameter in described.parameters())
    changes: list[str] = []
    if mesh.rank == 0:  # not before: a config that the resume has refused would stand beside checkpoints that it does not fit
        changes = RunDir(config.run_dir).note_config(config)
    tracker.message(
        f"{config.model.name}: {parameters:,} parameters, pattern {config.model.pattern}, {config.engine.dtype};"
        f" {mesh.sizes}"
        f" ({config.parallel.layout}, {config.parallel.attention}); {config.trainer.global_batch} x {config.trainer.seq_len:,}"
        f" tokens a step; run directory {config.run_dir}"
    )
    if checkpoint is not None:
        tracker.message(f"continuing after step {start} from {checkpoint}")
        if changes:
            more = f"; and {len(changes) - SHOWN} more, see {config.run_dir}/events.jsonl" if len(changes) > SHOWN else ""
            tracker.message(f"changed since the last start: {'; '.join(changes[:SHOWN])}{more}")
        tracker.event("resume", step=start, checkpoint=str(checkpoint), world_size=mesh.size)
    else:
        tracker.event("start", world_size=mesh.size)
    if start >= config.trainer.steps:
        tracker.message(
            f"the run already has its trainer.steps={config.trainer.steps} steps; raise it to train on, or give another run_dir"
        )
