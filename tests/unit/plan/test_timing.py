"""Seconds of a step: the causes add up, each formula by hand on a cluster of round numbers."""

from __future__ import annotations

import dataclasses

import pytest

from lctrain.attention_choice import costliest_case
from lctrain.parallel.cost import costed_steps
from lctrain.parallel.simulator import simulate
from lctrain.plan.attention import attention_cluster
from lctrain.plan.cost import Operation, Sent, StaticMemory
from lctrain.plan.layers import Layers
from lctrain.plan.step_time import CAUSES, StepTime
from lctrain.plan.timing import Timing
from tests.unit.plan.made import config_of, part

TERA, GIGA = 10**12, 10**9
STATIC = StaticMemory(4 * GIGA, 4 * GIGA, 8 * GIGA)
"""1e9 parameters in fp32."""


def costs_of(**changes):
    plain = {name: part(name) for name in ("embedding", "*", "-", "loss")}
    return plain | changes


def timing_of(cluster, *overrides, costs=None, static=STATIC):
    config = config_of("model=tiny", *overrides).model_copy(update={"cluster": cluster})
    layers = Layers(config)
    statics = {stage.index: static for stage in layers.stages}
    return Timing(config, cluster, layers, costs or costs_of(), statics)


def test_every_cause_has_a_name_and_counts():
    assert set(CAUSES) == {field.name for field in dataclasses.fields(StepTime)}
    vector = StepTime(**{name: float(index + 1) for index, name in enumerate(CAUSES)})
    assert vector.total == sum(range(1, len(CAUSES) + 1))
    assert (vector * 3 + vector).total == 4 * vector.total


def test_an_operation_takes_its_arithmetic_or_its_traffic(cluster):
    busy = part("-", others=(Operation("aten.mm", 2 * TERA, 1, 1), Operation("aten.addmm", 1, 3 * 10**12, 2)))
    quiet = part("loss", moved=10**12)
    timing = timing_of(cluster, "trainer.global_batch=1", costs=costs_of(**{"-": busy, "loss": quiet}))
    (stage,) = timing.stages()
    assert stage.forward.products == pytest.approx(4 * (2 + 2 * 3))
    assert stage.backward.products == pytest.approx(2 * stage.forward.products)
    assert (stage.forward.memory, stage.backward.memory) == pytest.approx((1.0, 2.0))


def test_bf16_products_have_their_own_rate(cluster):
    costs = costs_of(**{"-": part("-", flops=10**12)})
    fp32, bf16 = (
        timing_of(cluster, f"engine.dtype={dtype}", costs=costs).stages()[0].forward.products for dtype in ("fp32", "bf16")
    )
    assert fp32 == pytest.approx(4.0)
    assert bf16 == pytest.approx(2.0)


def test_attention_is_the_simulators_and_its_own_messages_are_not_paid_twice(cluster):
    sent = (Sent("cp", "attention", 10**12, 3),)
    over = ("parallel.cp=2", "trainer.seq_len=4096", "trainer.global_batch=1")
    timing = timing_of(cluster, *over, costs=costs_of(**{"*": part("*", sent=sent)}))

    case = (timing.strategies[None], *costliest_case(timing.config, None))
    (stage,) = timing.stages()
    for way in ("forward", "backward"):
        found = getattr(stage, way)
        alone = simulate(*case, way, attention_cluster(timing.config, cluster)).seconds
        assert found.attention > 0
        assert found.total == pytest.approx(4 * alone)
    assert stage.sent["cp"] == 4 * 2 * 10**12  # reported all the same
    assert costed_steps(*case, "forward")


def test_checkpointing_runs_attention_forward_again(cluster):
    plain, again = (
        timing_of(cluster, "parallel.cp=2", f"engine.activation_checkpointing={kind}").stages()[0] for kind in ("none", "layer")
    )
    assert again.forward == plain.forward
    assert again.backward.total == pytest.approx(plain.backward.total + plain.forward.total)


def test_what_travels_is_paid_by_its_dimension(cluster):
    sent = (Sent("cp", "all_gather", GIGA, 1), Sent("ep", "all_to_all", 3 * GIGA, 1))
    timing = timing_of(cluster, "parallel.cp=2", "trainer.global_batch=1", costs=costs_of(**{"-": part("-", sent=sent)}))
    (stage,) = timing.stages()
    assert stage.forward.sequence == pytest.approx(4 * 0.01)
    assert stage.forward.experts == 0  # a group of one
    tensor = timing_of(
        cluster,
        *("engine=megatron", "parallel.tp=2", "trainer.global_batch=1"),
        costs=costs_of(**{"-": part("-", sent=(Sent("tp", "reduce_scatter", 2 * GIGA, 1),))}),
    )
    assert tensor.stages()[0].forward.tensor == pytest.approx(4 * 0.02)


def test_ddp_hides_all_but_its_last_bucket_if_backward_is_long_enough(cluster):
    sent = 2 * 4 * GIGA // 2
    buckets = -(-4 * GIGA // (25 << 20))
    short = timing_of(cluster, "parallel.dp=2", "trainer.global_batch=2").stages()[0]
    long = timing_of(
        cluster, "parallel.dp=2", "trainer.global_batch=2", costs=costs_of(**{"-": part("-", flops=TERA)})
    ).stages()[0]
    seconds = sent / 100e9
    assert short.once.data == pytest.approx(seconds - short.backward.total)
    assert long.once.data == pytest.approx(seconds / buckets)
    assert long.sent["dp_cp"] == sent


def test_fsdp_moves_weights_in_every_micro_batch(cluster):
    static = StaticMemory(2 * GIGA, 2 * GIGA, 4 * GIGA)
    over = ("parallel.dp=2", "engine.data_parallel=fsdp")
    one, four = (timing_of(cluster, *over, f"trainer.global_batch={2 * count}", static=static).stages()[0] for count in (1, 4))
    root = 4 * 320 * 128
    assert one.sent["dp_cp"] == (3 * 4 * GIGA - root) // 2
    assert four.sent["dp_cp"] == 4 * one.sent["dp_cp"]
    assert four.once.data == pytest.approx(4 * one.once.data)


def test_zero_1_gathers_weights_after_the_step_and_hides_nothing(cluster):
    costs = costs_of(**{"-": part("-", flops=TERA)})
    over = ("engine=deepspeed", "parallel.dp=2", "trainer.global_batch=2")
    static = StaticMemory(4 * GIGA, 4 * GIGA, 6 * GIGA)
    stage = timing_of(cluster, *over, costs=costs, static=static).stages()[0]
    assert stage.once.data == pytest.approx((4 + 2) * GIGA / 100e9)
    hidden = timing_of(
        cluster, *over, "engine.deepspeed_config={zero_optimization: {overlap_comm: true}}", costs=costs, static=static
    )
    assert 2 * GIGA / 100e9 < hidden.stages()[0].once.data < stage.once.data


def test_the_optimizer_reads_and_writes_its_states_once(cluster):
    stage = timing_of(cluster).stages()[0]
    assert stage.once.optimizer == pytest.approx((28 + 12) * GIGA / 1e12)


@pytest.mark.parametrize(("pieces", "passes"), [(1, 4), (1, 1), (2, 4)])
def test_a_pipeline_waits_for_one_passage_through_the_others(cluster, pieces, passes):
    costs = costs_of(**{"-": part("-", flops=10**12), "*": part("*", moved=10**12), "loss": part("loss", flops=10**11)})
    over = ("engine=megatron", "parallel.pp=2", f"parallel.virtual_stages={pieces}", f"trainer.global_batch={passes}")
    timing = timing_of(cluster, *over, costs=costs)
    stages = timing.stages()
    times = [stage.micro_batch for stage in stages]
    step = timing.step(stages)
    assert step.bubble == pytest.approx(min(times) / pieces)
    one = timing.activation_bytes() / 100e9
    assert step.pipeline == pytest.approx(2 * one * (passes * (pieces == 1) + 1))
    slowest = max(stages, key=lambda stage: stage.micro_batch)
    assert step.total == pytest.approx(passes * max(times) + slowest.once.total + step.bubble + step.pipeline)


def test_gradient_accumulation_repeats_passes_but_not_the_update(cluster):
    costs = costs_of(**{"-": part("-", flops=TERA)})
    one, four = (timing_of(cluster, f"trainer.global_batch={count}", costs=costs) for count in (1, 4))
    steps = [timing.step(timing.stages()) for timing in (one, four)]
    assert steps[1].products == pytest.approx(4 * steps[0].products)
    assert steps[1].optimizer == steps[0].optimizer


def test_kernels_of_another_arithmetic_are_as_much_slower_as_products(cluster):
    fp32, bf16 = (timing_of(cluster, f"engine.dtype={dtype}").stages()[0].forward.attention for dtype in ("fp32", "bf16"))
    calls = 4 * cluster.kernel.call_us * 1e-6
    assert fp32 - calls == pytest.approx(2 * (bf16 - calls))
