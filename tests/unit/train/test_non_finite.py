"""What the loop does with a step that is not finite: stop, skip, and stop after too many skips."""

import itertools
import math

import torch

import lctrain.train
from lctrain.config.schema import TrainConfig
from lctrain.engines.make import make_engine
from lctrain.engines.torch_engine import TorchEngine
from lctrain.errors import UserError
from lctrain.launch.process import Process
from lctrain.launch.ranks import run_ranks
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_events, read_metrics
from lctrain.train import train

STEPS = 6


def poisoned(rank: int, world_size: int, config: TrainConfig, steps: set[int]) -> tuple[str | None, list[float]]:
    """Train with the loss of rank 1 made NaN in some steps (from 1 on): the UserError, and a digest of the weights by step."""
    digests = []

    class Engine(TorchEngine):
        def backward(self, batch, targets):
            self.bad = self.mesh.rank == 1 and batch.step + 1 in steps
            return super().backward(batch, targets)

        def discard(self):
            super().discard()
            if hasattr(self, "bad"):  # a step has begun, and this is its end
                digests.append(float(sum(parameter.detach().double().square().sum() for parameter in self.model.parameters())))

        def _forward(self, micro):
            sums = super()._forward(micro)
            if not getattr(self, "bad", False):
                return sums
            return sums._replace(objective=sums.objective * math.nan, cross_entropy=sums.cross_entropy * math.nan)

    lctrain.train.make_engine = Engine
    torch.set_num_threads(1)
    try:
        assert train(config, Process(rank, world_size, rank, world_size)) == 0
    except UserError as error:
        return str(error), digests
    finally:
        lctrain.train.make_engine = make_engine
    return None, digests


def test_stop_names_step_rank_and_documents(make_config):
    config = make_config()
    (message, _), (other, _) = run_ranks(poisoned, 2, config, {4})
    run = RunDir(config.run_dir)
    assert message == other
    assert message.startswith("step 4: loss nan, gradient norm nan: first not finite on rank 1, sample 6, document")
    assert "rank 0" not in message
    assert message.endswith("; stopped, checkpoints stay as they were")
    assert [record["loss"] is None for record in read_metrics(run.metrics)] == [False, False, False, True]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000002"]
    assert [event["step"] for event in read_events(run.events) if event["kind"] == "not_finite"] == [4]


def test_skip_leaves_the_weights_and_goes_on(make_config):
    config = make_config(non_finite="skip", max_skips=2)
    results = run_ranks(poisoned, 2, config, {2, 3, 5})  # never more than two in a row
    for message, digests in results:
        assert message is None
        assert digests == results[0][1]
        same = [now == before for before, now in itertools.pairwise(digests)]
        assert same == [True, True, False, True, False]
    records = read_metrics(RunDir(config.run_dir).metrics)
    assert [record["step"] for record in records if record.get("skipped")] == [2, 3, 5]
    assert [record["loss"] is None for record in records] == [False, True, True, False, True, False]
    assert records[-1]["consumed"] == 2 * STEPS  # skipped samples are not seen again


def test_too_many_skips_in_a_row_stop(make_config):
    config = make_config(non_finite="skip", max_skips=2)
    for message, _ in run_ranks(poisoned, 2, config, {2, 3, 4, 5}):
        assert message.startswith("step 4: loss nan")
        assert message.endswith("; stopped after 2 skipped steps in a row (trainer.max_skips), checkpoints stay as they were")
    run = RunDir(config.run_dir)
    assert [record["step"] for record in read_metrics(run.metrics)] == [1, 2, 3, 4]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000002"]
