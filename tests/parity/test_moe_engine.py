"""Whole models with experts under the torch engine: every layout trains as one process does, balancing included."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from lctrain.config.moe import BalanceConfig, MoeConfig, RoutedHeadsConfig, RouterConfig
from lctrain.config.schema import TrainConfig
from lctrain.engines.base import StepResult
from lctrain.launch.ranks import run_ranks
from lctrain.models.moe.stats import balancers
from tests.parity.conftest import Setup, count_all_targets, make_batch, make_engine

MOE = MoeConfig(
    n_experts=8,
    top_k=2,
    d_ff=24,
    shared_d_ff=16,
    router=RouterConfig(score="sigmoid", scale=1.5, jitter=0.05),
    balance=BalanceConfig(switch=0.05, sequence=0.05, z_loss=0.01, bias_rate=0.003),
)


@dataclasses.dataclass(frozen=True)
class MoeSetup(Setup):
    """Attention of routed heads, then experts, twice."""

    ep: int = 1
    length: int = 250
    capacity: float | None = None

    def config(self) -> TrainConfig:
        config = super().config()
        heads = config.model.attention.model_copy(update={"routed_heads": RoutedHeadsConfig(shared=1, top_k=2)})
        model = {"pattern": "*EWE", "attention": heads, "moe": MOE.model_copy(update={"capacity_factor": self.capacity})}
        return config.model_copy(
            update={
                "model": config.model.model_copy(update=model),
                "parallel": config.parallel.model_copy(update={"ep": self.ep}),
            }
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of all steps; whole gradients of the first; whole weights and biases after the last; rank 0's."""

    steps: list[StepResult]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    biases: list[Tensor]


def train_steps(rank: int, world_size: int, setup: MoeSetup, steps: int, evaluate: bool = False) -> Outcome:
    engine = make_engine(setup, rank)
    results, gradients = [], {}
    for step in range(steps):
        batch = make_batch(setup, engine.mesh, step)
        if evaluate:
            engine.evaluate(make_batch(setup, engine.mesh, 100).micro_batches)
        results.append(engine.backward(batch, count_all_targets(batch, engine.mesh)))
        if step == 0:
            gradients = engine.gradients()
        engine.update(setup.lr)
    weights = {name: engine.cut.whole(name, p).clone() for name, p in engine.model.named_parameters()}
    weights = {name: w.full_tensor() if hasattr(w, "full_tensor") else w for name, w in weights.items()}
    biases = [b.bias.clone() for b in balancers(engine.model) if b.bias is not None]
    return Outcome(results, gradients, weights if rank == 0 else {}, biases)


@functools.cache
def run(setup: MoeSetup, steps: int = 2, evaluate: bool = False) -> Outcome:
    ranks = run_ranks(train_steps, setup.dp * setup.cp, setup, steps, evaluate)
    assert all(rank.steps == ranks[0].steps for rank in ranks), "ranks report different numbers"
    assert all(torch.equal(a, b) for rank in ranks for a, b in zip(rank.biases, ranks[0].biases, strict=True))
    return ranks[0]


def compare(one: Outcome, many: Outcome, tolerance: float) -> None:
    for ours, theirs in zip(many.steps, one.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=tolerance)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=tolerance)
        assert ours.extra.keys() == theirs.extra.keys()
        for name, values in theirs.extra.items():
            assert torch.allclose(torch.tensor(ours.extra[name]), torch.tensor(values), rtol=2e-3, atol=1e-6), name
    assert many.gradients.keys() == one.gradients.keys() == one.weights.keys()
    for name, gradient in one.gradients.items():
        assert float(gradient.norm()) > 0, name
        error = float((many.gradients[name] - gradient).norm() / gradient.norm())
        assert error < max(tolerance, 1e-7), f"{name}: {error:.1e}"  # handed out in fp32
    for name, weight in one.weights.items():
        assert float((many.weights[name] - weight).abs().max()) < 1e-6, name
    assert all(torch.equal(a, b) for a, b in zip(one.biases, many.biases, strict=True))


GRIDS = {
    "cp2 ep2": {"cp": 2, "ep": 2},
    "cp3": {"cp": 3, "layout": "striped"},
    "dp2 ep2 recomputed": {"dp": 2, "ep": 2, "checkpointing": "layer"},
    "cp4 ep4 balanced": {"cp": 4, "ep": 4, "layout": "balanced"},
    "dp2 cp2 ep4": {"dp": 2, "cp": 2, "ep": 4},
    "dp2 cp2 ep2 fsdp": {"dp": 2, "cp": 2, "ep": 2, "data_parallel": "fsdp"},
    "dp2 ep2 fsdp recomputed": {"dp": 2, "ep": 2, "data_parallel": "fsdp", "checkpointing": "layer"},
    "cp2 fsdp": {"cp": 2, "data_parallel": "fsdp"},
}


@pytest.mark.parametrize("name", GRIDS)
def test_equal_to_one_process(name: str) -> None:
    """fp64. Capacity takes part: what is dropped must not depend on the layout either."""
    compare(run(MoeSetup(double=True, capacity=1.0)), run(MoeSetup(double=True, capacity=1.0, **GRIDS[name])), 1e-10)


def test_recomputation_and_evaluation_count_nothing_twice() -> None:
    plain = run(MoeSetup(double=True))
    for other in (run(MoeSetup(double=True, checkpointing="layer")), run(MoeSetup(double=True), evaluate=True)):
        assert [step.extra for step in other.steps] == [step.extra for step in plain.steps]
        assert all(torch.equal(a, b) for a, b in zip(plain.biases, other.biases, strict=True))


def test_biases_move_once_per_step_by_the_counts_of_the_whole_batch() -> None:
    first = run(MoeSetup(), 1)
    for load, bias in zip(first.steps[0].extra["moe_load"], first.biases, strict=True):
        wanted = 0.003 * (1 / 8 - torch.tensor(load)).sign()
        assert torch.allclose(bias, wanted)
        assert sum(load) == pytest.approx(1, abs=1e-3)
    assert first.steps[0].extra["moe_bias"] == [0, 0]
    second = run(MoeSetup(), 2)
    assert second.steps[1].extra["moe_bias"] == [0.003, 0.003]


def discard(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """Biases after a discarded step and one more, and after that step alone."""
    found = []
    for steps in ((0, 1), (1,)):
        engine = make_engine(MoeSetup(), rank)
        for step in steps:
            batch = make_batch(MoeSetup(), engine.mesh, step)
            engine.backward(batch, count_all_targets(batch, engine.mesh))
            if step == 0:
                engine.discard()
            else:
                engine.update(1e-3)
        found.append(torch.cat([b.bias for b in balancers(engine.model) if b.bias is not None]).tolist())
    return found[0], found[1]


def test_a_discarded_step_leaves_no_counts() -> None:
    (after, alone), *_ = run_ranks(discard, 1)
    assert after == alone
