"""The torch engine: evaluation, state, and what a step leaves behind. That all grids agree is tested in tests/parity."""

import math

import pytest
import torch

from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import ModelConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.engines.base import train_step
from lctrain.engines.torch_engine import TorchEngine
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.layout import IGNORE, SequenceLayout, count_targets, document_positions, shift_labels
from lctrain.parallel.mesh import ProcessMesh

LENGTH = 30
ROWS = (((0, LENGTH), 5), ((0, 3, 17), None))


def make_engine(rank: int = 0, cp: int = 1, dp: int = 1, **engine: object) -> TorchEngine:
    config = TrainConfig(
        run_dir="unused",
        model=ModelConfig(pattern="*-", d_model=16, vocab_size=23),
        data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
        parallel=ParallelConfig(cp=cp),
        engine=EngineConfig(device="cpu", **engine),
        trainer=TrainerConfig(global_batch=2, loss_chunk=8),
        launcher=LauncherConfig(processes=cp * dp),
    )
    mesh = ProcessMesh(rank, dp, cp)
    return TorchEngine(config, mesh, mesh.make_groups(), torch.device("cpu"))


def micro_batches(engine: TorchEngine, rows=ROWS) -> tuple[MicroBatch, ...]:
    """This rank's rows, each a micro-batch."""
    mesh, found = engine.mesh, []
    generator = torch.Generator().manual_seed(0)
    for index, (borders, following) in enumerate(rows):
        tokens = torch.randint(0, 23, (1, LENGTH), generator=generator)
        labels = shift_labels(tokens, [borders], [following])
        if index % mesh.dp == mesh.dp_rank:
            layout = SequenceLayout("zigzag", mesh.cp, LENGTH)
            parts = (
                layout.shard(x, mesh.cp_rank, 1, pad)
                for x, pad in ((tokens, 0), (labels, IGNORE), (document_positions([borders], LENGTH), 0))
            )
            found.append(MicroBatch(*parts, (borders,), layout, count_targets(labels), (index,), ((),)))
    return tuple(found)


def step(engine: TorchEngine, rows=ROWS):
    batch = StepBatch(0, 0, micro_batches(engine, rows), 0)
    targets = sum(borders[-1] - len(borders) + 1 + (following is not None) for borders, following in rows)
    return train_step(engine, batch, targets, 1e-2)


def test_evaluation_is_the_loss_before_the_step() -> None:
    engine = make_engine()
    before = engine.evaluate(micro_batches(engine))
    result = step(engine)
    assert before == pytest.approx(result.loss, rel=1e-6)
    assert before == pytest.approx(math.log(23), rel=0.05), "weights start small"
    assert engine.evaluate(micro_batches(engine)) < before
    assert all(p.grad is None for p in engine.model.parameters())


def test_evaluation_of_nothing() -> None:
    engine = make_engine()
    assert math.isnan(engine.evaluate(()))
    assert math.isnan(engine.evaluate(micro_batches(engine, (((0, 1), None),))))


def evaluate(rank: int, world_size: int, cp: int) -> float:
    engine = make_engine(rank, cp, world_size // cp)
    return engine.evaluate(micro_batches(engine))


@pytest.mark.parametrize(("ranks", "cp"), [(2, 2), (2, 1), (3, 3), (4, 2)])
def test_evaluation_is_the_mean_over_all_targets_on_any_grid(ranks: int, cp: int) -> None:
    (one,) = run_ranks(evaluate, 1, 1)
    for loss in run_ranks(evaluate, ranks, cp):
        assert loss == pytest.approx(one, rel=1e-6)


def test_a_batch_without_targets_changes_no_number_to_nan() -> None:
    engine = make_engine()
    result = step(engine, (((0, 1), None), ((0, 1, 2), None)))
    assert (result.loss, result.grad_norm, result.problem) == (0.0, 0.0, None)
    assert all(p.isfinite().all() for p in engine.model.parameters())


def continue_from_state(rank: int, world_size: int, data_parallel: str) -> tuple[list[float], list[float]]:
    """Losses of steps 2 and 3 of a run, and of an engine that took over its state after step 1."""
    first = make_engine(rank, world_size, 1, data_parallel=data_parallel)
    step(first)
    state = first.state()
    copied = {kind: _clone(part) for kind, part in state.items()}
    losses = [step(first).loss, step(first).loss]
    second = make_engine(rank, world_size, 1, data_parallel=data_parallel)
    second.load_state(copied)
    return losses, [step(second).loss, step(second).loss]


def _clone(part):
    if isinstance(part, dict):
        return {key: _clone(value) for key, value in part.items()}
    if isinstance(part, list):
        return [_clone(value) for value in part]
    return part.clone() if isinstance(part, torch.Tensor) else part


@pytest.mark.parametrize(("ranks", "data_parallel"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_state_carries_on_bitwise(ranks: int, data_parallel: str) -> None:
    for losses, continued in run_ranks(continue_from_state, ranks, data_parallel):
        assert continued == losses


def steps_after_state(rank: int, world_size: int, data_parallel: str) -> tuple[list[float], list[float]]:
    """Losses of three steps of two engines: one whose state was asked for before the first, and loaded again, and another."""
    losses = []
    for asked in (True, False):
        engine = make_engine(rank, world_size, 1, data_parallel=data_parallel)
        if asked:
            engine.load_state(engine.state())
        losses.append([step(engine).loss for _ in range(3)])
    return losses[0], losses[1]


@pytest.mark.parametrize(("ranks", "data_parallel"), [(1, "ddp"), (2, "fsdp")])
def test_a_state_from_before_the_first_step_counts_none(ranks: int, data_parallel: str) -> None:
    for asked, undisturbed in run_ranks(steps_after_state, ranks, data_parallel):
        assert asked == undisturbed


def state_names(rank: int, world_size: int, data_parallel: str) -> set[str]:
    engine = make_engine(rank, world_size, 1, data_parallel=data_parallel)
    step(engine)
    state = engine.state()
    return set(state["model"]) | {f"optimizer {name}" for name in state["optimizer"]["state"]}


def test_state_has_the_same_names_on_any_grid() -> None:
    names = [run_ranks(state_names, ranks, kind)[0] for ranks, kind in ((1, "ddp"), (2, "ddp"), (2, "fsdp"))]
    assert names[0] == names[1] == names[2]
    assert "embedding" in names[0]
    assert "optimizer layers.0.mixer.q.weight" in names[0]


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_bf16_keeps_fp32_weights_and_moments(checkpointing: str) -> None:
    engine = make_engine(dtype="bf16", activation_checkpointing=checkpointing)
    losses = [step(engine).loss for _ in range(5)]
    assert losses[-1] < losses[0]
    for parameter in engine.model.parameters():
        assert parameter.dtype == torch.float32
        assert {v.dtype for v in engine.optimizer.state[parameter].values()} == {torch.float32}


def test_clipping_scales_what_the_optimizer_sees() -> None:
    engine = make_engine()
    engine.config = engine.config.model_copy(update={"optim": engine.config.optim.model_copy(update={"clip_norm": 1e-3})})
    seen = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: seen.append(math.sqrt(sum(float(p.grad.square().sum()) for p in engine.model.parameters())))
    )
    result = step(engine)
    assert result.grad_norm > 1e-2
    assert seen == [pytest.approx(1e-3, rel=1e-5)]
