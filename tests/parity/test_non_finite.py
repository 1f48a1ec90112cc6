"""A loss that is not finite: said by all ranks alike, with the place where it came from, and without an update."""

import math

import pytest
import torch
from torch.distributed.tensor import DTensor

from lctrain.engines.base import StepResult, train_step
from lctrain.launch.ranks import run_ranks

SAMPLE, AT, TOKEN = 4, 249, 60
"""The last token of a row of three documents is one that occurs nowhere else, and its embedding is broken."""


def broken_step(rank: int, world_size: int, setup, world: dict, what: str) -> tuple[StepResult, bool, StepResult]:
    """One step with something broken; whether the weights stayed as they were; and a step after that, mended."""
    engine = world["make_engine"](setup, rank)

    def change(sample: int, tokens: torch.Tensor) -> None:
        tokens[tokens == TOKEN] = 0
        if sample == SAMPLE:
            tokens[AT] = TOKEN

    def local(parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach()

    batch = world["make_batch"](setup, engine.mesh, 0, change)
    targets = world["count_all_targets"](batch, engine.mesh)
    embedding = engine.model.embedding
    with torch.no_grad():
        sound = embedding * 1.0
        rows = torch.zeros(61, 1)
        rows[TOKEN] = math.nan
        if isinstance(embedding, DTensor):
            from torch.distributed.tensor import distribute_tensor

            rows = distribute_tensor(rows, embedding.device_mesh, embedding.placements)
        if what == "loss":
            embedding += rows
    if what == "gradient":
        engine.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    before = [local(p).clone() for p in engine.model.parameters()]
    result = train_step(engine, batch, targets, 1e-3)
    pairs = zip(before, engine.model.parameters(), strict=True)
    same = all(torch.equal(old.nan_to_num(), local(new).nan_to_num()) for old, new in pairs)
    same &= all(p.grad is None for p in engine.model.parameters()) and not engine.optimizer.state
    with torch.no_grad():
        embedding.copy_(sound)
    after = train_step(engine, batch, targets, 1e-3) if what == "loss" else result
    return result, same, after


GRIDS = {
    "one process": ({"micro_batch": 3}, 0, (3, 4, 5)),
    "cp2": ({"cp": 2}, 0, (4,)),
    "dp2 cp2": ({"cp": 2, "dp": 2}, 0, (4,)),
    "cp2 contiguous": ({"cp": 2, "layout": "contiguous", "attention": "all_gather"}, 1, (4,)),
    "fsdp": ({"cp": 2, "dp": 2, "data_parallel": "fsdp", "layout": "contiguous"}, 1, (4,)),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_place_is_named(make_setup, world, name: str) -> None:
    grid, rank, samples = GRIDS[name]
    setup = make_setup(length=250, **grid)
    results = run_ranks(broken_step, setup.dp * setup.cp, setup, world, "loss")
    problem = results[0][0].problem
    assert problem is not None
    assert problem.startswith("loss nan, gradient norm nan: first not finite on ")
    for sample in samples:
        assert f"rank {rank}, sample {sample}, document" in problem
    assert f"documents {SAMPLE * 100} of corpus 0, {SAMPLE * 100 + 1} of corpus 0, {SAMPLE * 100 + 2} of corpus 0" in problem
    for result, same, after in results:
        assert result.problem == problem
        assert same, "the weights were updated, or gradients left behind"
        assert after.problem is None
        assert math.isfinite(after.loss)


def test_only_the_gradient_is_not_finite(make_setup, world) -> None:
    setup = make_setup(length=250)
    ((result, same, _),) = run_ranks(broken_step, 1, setup, world, "gradient")
    assert math.isfinite(result.loss)
    assert result.problem is not None
    assert result.problem.endswith("every loss is finite, the gradient overflowed")
    assert "over rank 0, sample 0, documents 0 of corpus 0, 1 of corpus 0, 2 of corpus 0; rank 0, sample 1" in result.problem
    assert "and 2 more" in result.problem, "six samples, of which four are shown"
    assert same
