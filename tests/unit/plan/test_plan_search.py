"""Searching layouts, remedies, variants: with parts and memory made up, so that the ranking is known."""

from __future__ import annotations

import pytest

from lctrain.errors import UserError
from lctrain.plan.cost import StaticMemory
from lctrain.plan.plan import make_plan, peak_flops
from lctrain.plan.remedies import remedies
from lctrain.plan.search import Grid, attention_seconds, grids, search
from lctrain.plan.step_time import StepTime
from lctrain.plan.variants import variant
from tests.unit.plan.made import config_of, part

MB = 1_000_000


def rehearse(config):
    """Work and what is kept shrink with cp and tp; checkpointing keeps a tenth and computes a third more."""
    share = config.cp * config.parallel.tp
    again = config.engine.activation_checkpointing == "layer"
    made = part("-", flops=(4 if again else 3) * 10**11 // share, kept=3000 * MB // share // (10 if again else 1))
    return {"embedding": part("embedding"), "*": part("*"), "-": made, "loss": part("loss")}


def static(config, stage):
    """500 MB of weights over tp and pp; FSDP divides them over dp x cp."""
    held = 500 * MB // (config.parallel.tp * config.parallel.pp)
    if config.engine.data_parallel == "fsdp":
        held //= config.grid["dp"] * config.cp
    return StaticMemory(held, held, 2 * held)


def searched(cluster, devices, *overrides):
    config = config_of("model=tiny", "trainer.global_batch=8", *overrides).model_copy(update={"cluster": cluster})
    return search(config, devices, 0.1, rehearse, static)


def test_grids_are_all_that_the_engine_can_with_tp_inside_a_node():
    assert set(grids(4, 8, "torch")) == {Grid(1, 4, 1, 1), Grid(1, 2, 2, 1), Grid(1, 1, 4, 1)}
    found = list(grids(16, 4, "megatron"))
    assert len(found) == len(set(found))
    assert all(pp * dp * cp * tp == 16 and tp <= 4 for pp, dp, cp, tp in found)
    assert Grid(2, 2, 2, 2) in found
    assert Grid(1, 16, 1, 1) in found


def test_the_fastest_that_fit_come_first(cluster):
    found = searched(cluster, 4, "engine=megatron", "trainer.global_batch=2")
    speeds = [plan.tokens_per_s for plan in found.plans]
    assert speeds == sorted(speeds, reverse=True)
    assert all(plan.fits and plan.config.processes == 4 for plan in found.plans)
    assert {tuple(plan.config.grid.values()) for plan in found.plans} >= {(1, 1, 4, 1), (1, 1, 2, 2)}
    assert found.refused > 0  # dp=4 has nothing to do with 2 samples
    assert found.reason


def test_checkpointing_only_where_a_layout_does_not_fit_without(cluster):
    found = searched(cluster, 2)
    ways = {(plan.config.grid["cp"], plan.config.engine.activation_checkpointing) for plan in found.plans}
    assert ways == {(1, "layer"), (2, "none")}  # 12 GB kept by one device of 9


def test_what_a_sublayer_costs_is_rehearsed_once_for_all_grids(cluster):
    calls = []

    def counted(config):
        calls.append((config.cp, config.parallel.tp, config.engine.activation_checkpointing))
        return rehearse(config)

    config = config_of("model=tiny", "trainer.global_batch=8", "engine=megatron").model_copy(update={"cluster": cluster})
    search(config, 8, 0.1, counted, static)
    assert len(calls) == len(set(calls))


def test_nothing_fits(cluster):
    device = cluster.device.model_copy(update={"memory_gb": 0.1})
    found = searched(cluster.model_copy(update={"device": device}), 2)
    assert not found.plans
    assert found.dropped > 0


def test_no_grid_passes_the_checks(cluster):
    with pytest.raises(UserError, match=r"plan\.gpus=7: no layout .* first says: .*parallel\.ep=2"):
        searched(cluster, 7, "model=hybrid_tiny", "parallel.ep=2")


def test_a_variant_is_checked_and_has_as_many_processes_as_its_grid():
    config = config_of("model=tiny", "engine=megatron", "parallel.dp=2", "parallel.cp=2", "trainer.global_batch=8")
    changed = variant(config, parallel__cp=4, engine__dtype="bf16")
    assert (changed.processes, changed.grid["dp"], changed.engine.dtype) == (8, 2, "bf16")
    assert changed.model == config.model
    with pytest.raises(UserError, match=r"parallel\.tp=3"):
        variant(config, parallel__tp=3)
    slurm = config_of("model=tiny", "launcher=slurm", "launcher.nodes=2", "launcher.processes_per_node=2", "parallel.cp=2")
    assert variant(slurm, parallel__cp=4).processes == 8


def test_remedies_are_tried_and_what_cannot_be_says_why(cluster, monkeypatch):
    monkeypatch.setattr("lctrain.plan.remedies.make_plan", lambda config, reserve: make_plan(config, reserve, rehearse, static))
    config = config_of("model=tiny", "parallel.dp=2", "trainer.global_batch=4").model_copy(update={"cluster": cluster})
    assert not make_plan(config, 0.1, rehearse, static).fits
    found = {remedy.change: remedy for remedy in remedies(config, 0.1)}
    assert found["engine.activation_checkpointing=layer"].plan.fits
    assert found["parallel.cp=2"].plan.fits
    assert found["parallel.cp=2"].plan.config.processes == 4
    assert not found["engine.data_parallel=fsdp"].plan.fits
    megatron = variant(config, engine__name="megatron")
    refused = {remedy.change: remedy for remedy in remedies(megatron, 0.1)}
    assert refused["parallel.tp=2"].plan is not None
    deep = variant(config, engine__name="megatron", parallel__pp=8)
    assert "parallel.pp=16" in {remedy.change for remedy in remedies(deep, 0.1) if remedy.plan is None and remedy.refused}


def test_a_cluster_that_says_nothing_of_its_devices_is_refused(cluster):
    config = config_of("model=tiny").model_copy(update={"cluster": cluster.model_copy(update={"device": None})})
    with pytest.raises(UserError, match=r"cluster=round does not say .*cluster\.device\.memory_gb"):
        make_plan(config, 0.1, rehearse, static)


def test_mfu_counts_published_peaks_for_bf16_and_products_otherwise(cluster):
    assert peak_flops(cluster, "bf16") == 2e12
    known = cluster.model_copy(update={"device": cluster.device.model_copy(update={"published": "H100"})})
    assert peak_flops(known, "bf16") == 989.5e12
    assert peak_flops(known, "fp32") == 1e12
    unknown = cluster.model_copy(update={"device": cluster.device.model_copy(update={"published": "abacus"})})
    with pytest.raises(UserError, match="published=abacus"):
        peak_flops(unknown, "bf16")


def test_offloading_is_refused_and_not_guessed(cluster):
    words = ["engine=deepspeed", "engine.deepspeed_config={zero_optimization: {offload_optimizer: {device: cpu}}}"]
    config = config_of("model=tiny", *words).model_copy(update={"cluster": cluster})
    with pytest.raises(UserError, match="offload_optimizer"):
        make_plan(config, 0.1, rehearse, static)


def test_tokens_and_mfu(cluster):
    config = config_of("model=tiny", "trainer.global_batch=8", "parallel.dp=2").model_copy(update={"cluster": cluster})
    plan = make_plan(config, 0.1, rehearse, static)
    assert plan.tokens == 8 * 1024
    assert plan.tokens_per_s == pytest.approx(plan.tokens / plan.step.total / 2)
    assert plan.mfu == pytest.approx(plan.flops / plan.step.total / 2 / 1e12)


def test_strategies_are_weighed_by_the_layers_that_use_them(cluster, monkeypatch):
    monkeypatch.setattr("lctrain.plan.search.attention_time", lambda *_: StepTime(attention=1.0))
    model = ("model=tiny", "model.pattern=(W-){3}*-", "model.attention.window=64", "parallel.cp=2")
    config = config_of(*model).model_copy(update={"cluster": cluster})
    assert attention_seconds(config, cluster, "ring") == 2 * (3 + 1)


def test_the_users_strategy_and_its_degrees_do_not_narrow_the_search(cluster):
    usp = (
        "parallel.cp=4",
        "parallel.attention=usp",
        "parallel.ulysses=4",
        "parallel.ring=token_ring",
        "parallel.nesting=outer",
    )
    found, plain = (searched(cluster, 2, *strategy) for strategy in (usp, ()))
    assert [plan.config.parallel for plan in found.plans] == [plan.config.parallel for plan in plain.plans]
