"""Nothing passes from one packed document to another, on one process or many."""

import pytest
import torch

from lctrain.launch.ranks import run_ranks

SAMPLE = 4
"""A row of three documents: [0, 83), the single token at 83, [84, 250)."""


def losses(rank: int, world_size: int, setup, world: dict, change_from: int | None, change_to: int):
    """This rank's losses of the sample's tokens and their layout; tokens [change_from, change_to) are others than usual."""
    engine = world["make_engine"](setup, rank)

    def change(sample: int, tokens: torch.Tensor) -> None:
        if sample == SAMPLE and change_from is not None:
            tokens[change_from:change_to] = (tokens[change_from:change_to] + 7) % 61

    batch = world["make_batch"](setup, engine.mesh, 0, change)
    (micro,) = (micro for micro in batch.micro_batches if SAMPLE in micro.samples)
    (losses,) = engine.token_losses([micro])
    return losses[micro.samples.index(SAMPLE)], micro.layout


@pytest.mark.parametrize(
    ("grid", "exact"),
    [
        ({"micro_batch": 2}, True),
        ({"cp": 2}, False),
        ({"cp": 3, "attention": "all_gather", "layout": "striped"}, False),
        ({"cp": 2, "data_parallel": "fsdp", "checkpointing": "layer"}, False),
    ],
    ids=["one process", "ring", "all_gather", "fsdp"],
)
@pytest.mark.parametrize("part", [(0, 83), (83, 84), (84, 250)], ids=["first", "one token", "last"])
def test_changing_a_document_changes_no_other(make_setup, world, grid: dict, exact: bool, part: tuple[int, int]) -> None:
    setup = make_setup(length=250, **grid)

    def run(*changed: int | None) -> torch.Tensor:
        parts = run_ranks(losses, setup.cp, setup, world, *changed)
        return parts[0][1].unshard([mine for mine, _ in parts], 0)

    before, after = run(None, 0), run(*part)
    same = torch.ones(250, dtype=torch.bool)
    same[slice(*part)] = False
    difference = (after - before).abs()
    assert float(difference[same].max()) <= (0.0 if exact else 1e-6)
    if part[1] - part[0] > 1:
        assert float(difference[~same].max()) > 0.01, "the change had an effect where it should"
