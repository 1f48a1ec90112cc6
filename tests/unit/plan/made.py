"""Configs, clusters and parts with round numbers."""

from __future__ import annotations

from lctrain.attention_choice import preset
from lctrain.config.cluster import ClusterConfig
from lctrain.config.device import DeviceConfig, ProductRates
from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.plan.cost import Operation, PartCost, PassCost, Sent, StaticMemory


def config_of(*overrides: str) -> TrainConfig:
    """Settings of `lctrain train`."""
    return load(TrainConfig, "train", ["run_dir=none", *overrides])


def round_cluster() -> ClusterConfig:
    """4 devices a node, 100 GB/s inside, 10 between on 2 cards, without latencies; 1 TFLOP/s, 1 TB/s, 10 GB."""
    h200 = preset("h200")
    device = DeviceConfig(memory_gb=10.0, gb_per_s=1000.0, product_tflops=ProductRates(bf16=2.0, fp32=1.0))
    links = {"inside": (100.0, 0.0), "between": (10.0, 0.0)}
    changed = {
        name: getattr(h200, name).model_copy(update={"gb_per_s": rate, "latency_us": late})
        for name, (rate, late) in links.items()
    }
    return h200.model_copy(update={"name": "round", "ranks_per_node": 4, "cards": 2, "device": device, **changed})


def part(
    name: str,
    flops: int = 0,
    moved: int = 0,
    kept: int = 0,
    peak: int = 0,
    sent: tuple[Sent, ...] = (),
    others: tuple[Operation, ...] = (),
) -> PartCost:
    """A part whose backward pass costs twice its forward pass, with half of `flops` in each of two products."""
    products = tuple(Operation(f"aten.{kind}", flops // 2, 0, 1) for kind in ("mm", "addmm")) if flops else ()
    copies = (Operation("aten.add", 0, moved, 1),) if moved else ()
    forward = (*products, *copies, *others)
    backward = tuple(operation._replace(calls=2 * operation.calls) for operation in forward)
    return PartCost(name, PassCost(forward, sent, peak), PassCost(backward, sent, 2 * peak), kept)


NO_STATIC = StaticMemory(0, 0, 0)
