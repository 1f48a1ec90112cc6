"""What all ranks know together: loss by position on any grid, who is slow, what was waited for, what memory holds."""

import time

import pytest
import torch

from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import ModelConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.config.tracking import TrackingConfig
from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.engines.base import train_step
from lctrain.engines.torch_engine import TorchEngine
from lctrain.launch.ranks import run_ranks
from lctrain.models.watch import position_bucket
from lctrain.parallel.layout import IGNORE, SequenceLayout, count_targets, document_positions, shift_labels
from lctrain.parallel.mesh import ProcessMesh
from lctrain.tracking.ranks import RankWatch

LENGTH = 30
ROWS = (((0, LENGTH), 5), ((0, 3, 17), None))


def test_buckets_are_powers_of_two_of_the_context():
    positions = torch.tensor([0, 1, 2, 3, 6, 7, 2**24 - 2, 2**24 - 1, 2**40])
    assert position_bucket(positions).tolist() == [0, 1, 2, 2, 3, 3, 24, 24, 41]


def steps(rank: int, size: int, cp: int, data_parallel: str, checkpointing: str, every: int, slow: int | None) -> list[dict]:
    """Four steps over two rows; what RankWatch says after each, and the losses of the first."""
    dp = size // cp
    config = TrainConfig(
        run_dir="unused",
        model=ModelConfig(pattern="*-", d_model=16, vocab_size=23),
        data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
        parallel=ParallelConfig(cp=cp),
        engine=EngineConfig(device="cpu", data_parallel=data_parallel, activation_checkpointing=checkpointing),
        trainer=TrainerConfig(global_batch=2, loss_chunk=8, seq_len=LENGTH, steps=4),
        launcher=LauncherConfig(processes=size),
        tracking=TrackingConfig(log_every=every),
    )
    mesh = ProcessMesh(rank, dp, cp)
    engine = TorchEngine(config, mesh, mesh.make_groups(), torch.device("cpu"))
    generator, micros, reference = (
        torch.Generator().manual_seed(0),
        [],
        torch.zeros(2, 6, dtype=torch.float64),
    )
    layout = SequenceLayout("zigzag", cp, LENGTH)
    for index, (borders, following) in enumerate(ROWS):
        tokens = torch.randint(0, 23, (1, LENGTH), generator=generator)
        labels, positions = shift_labels(tokens, [borders], [following]), document_positions([borders], LENGTH)
        parts = (layout.shard(x, mesh.cp_rank, 1, pad) for x, pad in ((tokens, 0), (labels, IGNORE), (positions, 0)))
        micro = MicroBatch(*parts, (borders,), layout, count_targets(labels), (index,), ((),))
        if index % dp == mesh.dp_rank:
            micros.append(micro)
        if size == 1:
            (losses,) = engine.token_losses([micro])
            for loss, label, position in zip(losses[0].tolist(), labels[0].tolist(), positions[0].tolist(), strict=True):
                if label != IGNORE:
                    reference[:, position.bit_length()] += torch.tensor([loss, 1.0])
    watch = RankWatch(config, mesh, engine, torch.device("cpu"))
    if rank == slow:
        engine.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.05))
    targets = sum(count_targets(shift_labels(torch.zeros(1, LENGTH, dtype=torch.int64), [b], [f])) for b, f in ROWS)
    found = []
    for step in range(4):
        began = time.perf_counter()
        train_step(engine, StepBatch(step, 2 * step, tuple(micros), 0), targets, 0.0)
        engine.evaluate(micros)  # does not count
        found.append(watch.step(step + 1, time.perf_counter() - began))
    found[0]["reference"] = [loss / count if count else None for loss, count in reference.t().tolist()]
    return found


@pytest.fixture(scope="module")
def reference() -> list:
    return steps(0, 1, 1, "ddp", "none", 1, None)[0]["reference"]


@pytest.mark.parametrize(
    ("size", "cp", "data_parallel", "checkpointing"),
    [(1, 1, "ddp", "none"), (2, 1, "ddp", "none"), (2, 2, "fsdp", "layer"), (3, 3, "ddp", "none"), (4, 2, "ddp", "layer")],
)
def test_loss_by_position_is_that_of_one_process(reference, size, cp, data_parallel, checkpointing):
    for found in run_ranks(steps, size, cp, data_parallel, checkpointing, 1, None):
        for record in found:
            assert record["loss_by_position"] == pytest.approx(reference, rel=1e-3)
    assert reference[0] is not None
    assert len(reference) == 6


def test_records_come_when_a_line_does_and_cover_the_steps_since_then():
    (found,) = run_ranks(steps, 1, 1, "ddp", "none", 3, None)
    assert [bool(record.get("loss_by_position")) for record in found] == [False, False, True, True]
    assert "slowest_rank" not in found[2]
    assert found[2]["memory_weights_mb"] == found[2]["memory_gradients_mb"]
    assert found[2]["memory_optimizer_mb"] == pytest.approx(2 * found[2]["memory_weights_mb"], abs=0.02)


@pytest.mark.parametrize("cp", [1, 2])
def test_the_slow_rank_is_named_although_the_other_waits_for_it(cp):
    first, second = run_ranks(steps, 2, cp, "ddp", "none", 4, 1)
    assert first[3] | {"memory_rest_mb": 0} == second[3] | {"memory_rest_mb": 0}
    record = first[3]
    assert record["slowest_rank"] == 1
    assert record["slowest_rank_excess"] > 0.3
    own = record["rank_forward_s"]
    assert own[1] > 0.05
    assert own[0] < 0.04
    if cp == 2:
        assert record["exposed_comm"] > 0.1
