"""Memory by stage: what is in flight under 1F1B and the interleaved schedule, and what a rank holds besides."""

from __future__ import annotations

import pytest

from lctrain.plan.cost import StaticMemory
from lctrain.plan.layers import Layers
from lctrain.plan.memory import most_kept, stage_memory
from tests.unit.plan.made import config_of, part


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("passes", [1, 2, 3, 8])
def test_1f1b_keeps_as_many_micro_batches_as_stages_follow(pp, passes):
    for stage in range(pp):
        assert most_kept([100], pp, stage, passes) == 100 * min(passes, pp - stage)


def test_the_interleaved_schedule_keeps_pieces_and_one_more():
    # Megatron: the first of 4 stages with 2 pieces warms up with 2 * 3 + 4 passes through a piece, and does one more
    assert most_kept([1, 1], 4, 0, 16) == 11
    assert most_kept([1, 1], 4, 3, 16) == 5
    assert most_kept([1, 1], 2, 0, 2) == 4  # all of both micro-batches


def test_pieces_count_by_what_they_keep():
    # stage 1 of 2: 2 passes ahead; the first piece of both micro-batches, then the second of the first
    assert most_kept([10, 1], 2, 1, 2) == 21


COSTS = {
    "embedding": part("embedding", kept=5, peak=1),
    "*": part("*", kept=100, peak=10),
    "-": part("-", kept=200, peak=20),
    "loss": part("loss", kept=7, peak=50),
}


def test_categories_add_up_and_the_largest_part_works():
    config = config_of("model=tiny")
    layers = Layers(config)
    found = stage_memory(config, layers, layers.stages[0], COSTS, StaticMemory(1000, 2000, 3000), message=64)
    assert (found.weights, found.gradients, found.optimizer) == (1000, 2000, 3000)
    assert found.activations == 5 + 4 * (100 + 200) + 7
    assert found.working == 100  # the loss, backward
    assert found.buffers == 0
    assert found.total == 6000 + 1212 + 100


def test_stages_keep_their_own_parts():
    config = config_of("model=tiny", "engine=megatron", "parallel.pp=2", "trainer.global_batch=4")
    layers = Layers(config)
    first, last = (stage_memory(config, layers, stage, COSTS, StaticMemory(8, 8, 8), message=64) for stage in layers.stages)
    assert "loss" not in layers.stages[0].parts
    assert "embedding" not in layers.stages[1].parts
    kept = [sum(COSTS[name].kept for name in stage.parts) for stage in layers.stages]
    assert (first.activations, last.activations) == (2 * kept[0], kept[1])
    assert first.buffers == last.buffers == 128
    assert (first.working, last.working) == (40, 100)


def test_fsdp_and_zero_hold_gathered_weights_or_buckets():
    for words, expected in (
        (["engine.data_parallel=fsdp"], True),
        (["engine=deepspeed", "engine.zero=3"], True),
        (["engine=deepspeed", "engine.zero=1"], True),
        (["engine=deepspeed", "engine.zero=0"], False),
        ([], False),
    ):
        config = config_of("model=tiny", "parallel.dp=2", *words)
        layers = Layers(config)
        found = stage_memory(config, layers, layers.stages[0], COSTS, StaticMemory(4_000_000, 4_000_000, 8_000_000), 0)
        assert (found.buffers > 0) == expected, words
