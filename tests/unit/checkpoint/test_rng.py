"""Random generators continue where they were."""

import random

import numpy as np
import pytest
import torch

from lctrain.checkpoint.rng import rng_state, set_rng_state
from lctrain.checkpoint.store import CheckpointStore


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss(0, 1)  # noqa: NPY002


@pytest.mark.parametrize("waiting", [False, True], ids=["even", "a second normal number waits"])
def test_generators_continue_after_a_checkpoint(tmp_path, waiting):
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    if waiting:
        random.gauss(0, 1), np.random.randn()  # noqa: NPY002
    store = CheckpointStore(tmp_path, keep_last=1)
    path = store.save(1, {"rng": rng_state(0)}, {})
    expected = draw()
    draw()
    state = {"rng": rng_state(0)}
    store.load(path, state)
    set_rng_state(state["rng"])
    assert draw() == expected


def test_a_rank_that_the_checkpoint_does_not_know_keeps_its_seed(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    path = store.save(1, {"model": {"w": torch.ones(1)}, "rng": rng_state(0)}, {})
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    state = {"model": {"w": torch.zeros(1)}, "rng": rng_state(5)}
    store.load(path, state)
    set_rng_state(state["rng"])
    assert torch.equal(torch.rand(3), expected)
    assert state["model"]["w"].item() == 1


def test_all_states_are_bytes():
    (generators,) = rng_state(3).values()
    assert {tensor.dtype for tensor in generators.values()} == {torch.uint8}
