"""Spikes, and going back: the run that went back equals one that left the batches out from the beginning."""

import dataclasses
import math
import shutil
from pathlib import Path

import torch

import lctrain.train
from lctrain.audit.check import audit
from lctrain.audit.history import read_history
from lctrain.config.schema import TrainConfig
from lctrain.engines.make import make_engine
from lctrain.engines.torch_engine import TorchEngine
from lctrain.errors import UserError
from lctrain.faults.passed_over import read_passed_over
from lctrain.launch.process import Process
from lctrain.launch.ranks import run_ranks
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_events, read_metrics
from lctrain.train import train

KEPT = ("step", "loss", "grad_norm", "lr", "digest", "consumed", "passed_over", "skipped")


def disturbed(rank: int, world_size: int, config: TrainConfig, factors: dict[int, float]) -> str | None:
    """Train with the reported loss of some steps (from 1 on) multiplied; the UserError."""

    class Engine(TorchEngine):
        def backward(self, batch, targets):
            result = super().backward(batch, targets)
            factor = factors.get(batch.step + 1, 1.0)
            problem = "loss nan" if math.isnan(factor) else None
            return dataclasses.replace(result, loss=result.loss * factor, problem=problem)

    lctrain.train.make_engine = Engine
    torch.set_num_threads(1)
    try:
        assert train(config, Process(rank, world_size, rank, world_size)) == 0
    except UserError as error:
        return str(error)
    finally:
        lctrain.train.make_engine = make_engine
    return None


def run(config: TrainConfig, factors: dict[int, float]) -> str | None:
    messages = run_ranks(disturbed, config.launcher.processes, config, factors)
    assert len(set(messages)) == 1
    return messages[0]


def metrics(config: TrainConfig) -> list[dict]:
    return [{key: record[key] for key in KEPT if key in record} for record in read_metrics(RunDir(config.run_dir).metrics)]


def clean(config: TrainConfig) -> bool:
    return not any(check.wrong for check in audit(read_history(config.run_dir)))


def test_goes_back_and_leaves_the_batch_out_also_after_a_resume(make_config):
    config = make_config(non_finite="rollback")
    run_dir = RunDir(config.run_dir)
    assert run(config, {4: math.nan}) is None
    (entry,) = read_passed_over(run_dir.passed_over)
    assert (entry.step, entry.samples, entry.returned_to, entry.found_at) == (4, (6, 7), 2, 4)
    assert entry.documents
    assert [record.get("passed_over", False) for record in metrics(config)] == [False, False, False, True, False, False]
    assert entry.digest == metrics(config)[3]["digest"]
    (event,) = [event for event in read_events(run_dir.events) if event["kind"] == "rollback"]
    assert (event["step"], event["returned_to"]) == (4, 2)
    assert clean(config)

    # From the beginning, the batch is now left out: the same losses, bit for bit. Nothing is disturbed any more.
    there = metrics(config)
    shutil.rmtree(run_dir.checkpoints)
    run_dir.metrics.unlink()
    assert run(config, {}) is None
    assert metrics(config) == there

    # From a checkpoint, without the file: the checkpoint knows.
    run_dir.passed_over.unlink()
    longer = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 7})})
    assert run(longer, {}) is None
    assert metrics(longer)[:6] == there
    assert len(metrics(longer)) == 7
    assert clean(longer)


def test_before_the_first_checkpoint_there_is_one_of_step_0(make_config):
    config = make_config(non_finite="rollback", checkpoint={"every": 5}, processes=1)
    assert run(config, {2: math.nan}) is None
    assert [entry.returned_to for entry in read_passed_over(RunDir(config.run_dir).passed_over)] == [0]
    assert clean(config)


def test_more_batches_and_too_many_rollbacks(make_config):
    config = make_config(non_finite="rollback", rollback_batches=2, max_rollbacks=1, processes=1)
    message = run(config, {4: math.nan, 6: math.nan})
    assert message is not None
    assert message.startswith("step 6: loss nan; stopped after 1 rollbacks (trainer.max_rollbacks)")
    entries = read_passed_over(RunDir(config.run_dir).passed_over)
    assert [(entry.step, entry.returned_to, entry.found_at) for entry in entries] == [(3, 2, 4), (4, 2, 4)]


def test_spike_is_skipped_and_its_documents_are_named(make_config):
    config = make_config(steps=16, non_finite="skip", spike=2.0, processes=1)
    assert run(config, {5: 3.0, 13: 3.0}) is None  # step 5: too early to know what is normal
    assert [record["step"] for record in metrics(config) if record.get("skipped")] == [13]
    (event,) = [event for event in read_events(RunDir(config.run_dir).events) if event["kind"] == "spike"]
    assert event["problem"].startswith("loss ")
    assert " is above 2 times the median " in event["problem"]
    assert event["samples"] == [24, 25]
    assert event["documents"]
    assert event["digest"] == metrics(config)[12]["digest"]
    assert clean(config)


def test_the_median_survives_a_resume(make_config):
    config = make_config(steps=16, non_finite="skip", spike=2.0, processes=1, checkpoint={"every": 12})
    short = config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 12})})
    assert run(short, {}) is None
    assert run(config, {13: 3.0}) is None
    assert [record["step"] for record in metrics(config) if record.get("skipped")] == [13]


def test_with_checkpoints_in_the_background(make_config):
    whole, config = make_config(non_finite="rollback"), make_config(non_finite="rollback", checkpoint={"asynchronous": True})
    assert run(whole, {5: math.nan}) is None
    there = metrics(whole)
    shutil.rmtree(Path(whole.run_dir))
    assert run(config, {5: math.nan}) is None
    assert metrics(config) == there
    saves = [event for event in read_events(RunDir(config.run_dir).events) if event["kind"] == "checkpoint"]
    assert all(event["stall_s"] <= event["seconds"] for event in saves)
    assert {event["step"] for event in saves} == {0, 2, 4, 6}
