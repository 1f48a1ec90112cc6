"""Cluster presets: all load, units are right, nonsense is refused."""

from __future__ import annotations

import pytest

from lctrain.attention_choice import preset
from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.devices import published_flops
from lctrain.errors import UserError


@pytest.mark.parametrize("name", ["h200", "h100", "a100_pcie", "a10_pcie", "cpu_gloo"])
def test_presets_load_and_build(name):
    cluster = preset(name).build()
    assert cluster.name == name
    topology = cluster.topology
    assert 0 < topology.between.bandwidth <= topology.inside.bandwidth
    assert 0 < topology.inside.latency < 1e-3
    assert topology.cards <= topology.ranks_per_node
    for table in ("forward", "backward", "causal_forward", "causal_backward"):
        rates = [rate for line in getattr(cluster.device, table).flops for rate in line]
        assert all(1e10 < rate < 1e15 for rate in rates)


def test_units():
    cluster = preset("h200").build()
    assert cluster.topology.inside.bandwidth == 450e9
    assert cluster.topology.between.latency == pytest.approx(20e-6)
    assert cluster.device.forward.at(8192, 8192) == pytest.approx(370e12)
    assert preset("cpu_gloo").build().topology.cpu_s_per_byte == pytest.approx(0.3e-9)
    assert preset("a10_pcie").build().topology.inside.alone == pytest.approx(12.9e9)


def test_a_run_takes_a_preset_and_changes_of_it():
    config = load(TrainConfig, "train", ["cluster=h200", "cluster.cards=4"])
    assert config.cluster is not None
    assert (config.cluster.name, config.cluster.cards) == ("h200", 4)
    assert load(TrainConfig, "train", []).cluster is None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["cluster=h20"], "did you mean cluster=h200"),
        (["cluster=h200", "cluster.inside.gb_per_s=0"], "cluster.inside.gb_per_s=0"),
        (["cluster=h200", "cluster.inside.duplex=both"], "full, half"),
        (["cluster=h200", "cluster.kernel.forward.rows=[1024,512]"], "must rise"),
        (["cluster=h200", "cluster.kernel.forward.columns=[1,2]"], "5 lines (rows) of 2 numbers (columns)"),
        (["cluster.cards=2"], "cluster.kernel has no value"),
        (["parallel.attention=auto", "parallel.ulysses=1"], "drop parallel.ulysses=1"),
        (["parallel.attention=auto", "parallel.nesting=outer"], "drop parallel.nesting=outer"),
        (["parallel.attention=ring", "parallel.ulysses=2"], "is for parallel.attention=usp, but parallel.attention=ring;"),
        (["parallel.attention=ulysses", "parallel.ring=token_ring"], "parallel.ring=token_ring is for parallel.attention=usp"),
        (["parallel.ring=double_ring", "parallel.node_size=2"], "parallel.ring=double_ring is for parallel.attention=usp"),
        (["parallel.attention=usp", "parallel.node_size=2"], "parallel.node_size=2 is for parallel.attention=double_ring"),
        (["parallel.attention=autoo"], "did you mean auto"),
    ],
)
def test_nonsense_is_refused(overrides, says):
    with pytest.raises(UserError) as refused:
        load(TrainConfig, "train", overrides)
    assert says in str(refused.value)


@pytest.mark.parametrize("name", ["h200", "h100", "a100_pcie", "a10_pcie", "cpu_gloo"])
def test_presets_know_their_device(name):
    device = preset(name).device
    assert device is not None
    assert 1 < device.memory_gb < 1000
    assert 1 < device.gb_per_s < 1e4
    assert device.product_tflops.fp32 < device.product_tflops.bf16
    if device.published is not None:
        peak = published_flops(device.published)
        assert peak is not None
        assert 0.5 * peak < device.product_tflops.bf16 * 1e12 < peak


def test_degrees_of_the_strategy_in_use_are_accepted():
    usp = ["parallel.attention=usp", "parallel.cp=8", "parallel.ulysses=2", "parallel.nesting=outer"]
    assert load(TrainConfig, "train", [*usp, "parallel.ring=double_ring", "parallel.node_size=2"]).parallel.node_size == 2
    assert load(TrainConfig, "train", ["parallel.attention=double_ring", "parallel.cp=4", "parallel.node_size=2"])
