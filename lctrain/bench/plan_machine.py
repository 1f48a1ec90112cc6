"""This machine as a cluster for `lctrain plan`: products, memory, the attention kernel and gloo, all ranks at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from statistics import fmean, median
from typing import NamedTuple

import torch
import torch.distributed as dist

from lctrain.bench.calibrate import Network, core_fraction, measure_device, measure_network, with_exchanges
from lctrain.config.cluster import ClusterConfig, KernelConfig, LinkConfig, RatesConfig
from lctrain.config.device import DeviceConfig, ProductRates
from lctrain.devices import gemm_flops
from lctrain.launch.ranks import RankPool
from lctrain.parallel.device import Device, Rates
from lctrain.parallel.group import RankGroup
from lctrain.parallel.payload import AttentionShape

CPU = torch.device("cpu")
ARRAY = 16 << 20
"""Bytes of the tensors whose sum tells the bandwidth of memory."""
COLLECTIVE = 4 << 20
"""Bytes of the tensors whose collectives are timed."""
REPEATS = 10


class CoreRates(NamedTuple):
    """FLOP/s of products in fp32 and bf16, bytes/s of memory, seconds of a tiny operation with its part of autograd's work."""

    fp32: float
    bf16: float
    memory: float
    operation: float


def measured_cluster(ranks: int, shape: AttentionShape) -> ClusterConfig:
    """The machine as `ranks` processes see it that all compute."""
    network, collective = Network(1e9, 1e9, 0.0, 0.0), None
    if ranks > 1:
        with closing(RankPool(2)) as pool:
            network, collective = measure_network(pool), min(pool.run(_collective_rate))
    with closing(RankPool(ranks)) as pool:
        rates = CoreRates(*(fmean(column) for column in zip(*pool.run(_core_rates), strict=True)))
        device = measure_device(pool, shape)
        network = with_exchanges(network, pool, shape, device)
        cores = len(os.sched_getaffinity(0)) * core_fraction(pool)
    link = LinkConfig(
        gb_per_s=network.one_way / 1e9,
        latency_us=network.latency * 1e6,
        duplex=network.duplex,
        collective_gb_per_s=None if collective is None else collective / 1e9,
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return ClusterConfig(
        name="this machine",
        kernel=_kernel(device, shape.dtype),
        device=DeviceConfig(
            memory_gb=memory / ranks,
            gb_per_s=rates.memory / 1e9,
            product_tflops=ProductRates(bf16=rates.bf16 / 1e12, fp32=rates.fp32 / 1e12),
            operation_us=rates.operation * 1e6,
        ),
        ranks_per_node=max(2, ranks),
        inside=link,
        between=link,
        cards=1,
        cpu_s_per_gb=max(1e-3, network.cpu_s_per_byte * 1e9),
        cpu_us_per_message=network.cpu_s_per_message * 1e6,
        cpu_us_per_exchange=network.cpu_s_per_exchange * 1e6,
        cores=cores,
    )


def _kernel(device: Device, dtype: torch.dtype) -> KernelConfig:
    def table(rates: Rates) -> RatesConfig:
        lines = tuple(tuple(rate / 1e12 for rate in line) for line in rates.flops)
        return RatesConfig(rows=rates.rows, columns=rates.columns, tflops=lines)

    return KernelConfig(
        dtype="fp32" if dtype == torch.float32 else "bf16",
        forward=table(device.forward),
        backward=table(device.backward),
        causal_forward=table(device.causal_forward),
        causal_backward=table(device.causal_backward),
        call_us=device.call_s * 1e6,
        pass_us=device.pass_s * 1e6,
        pass_s_per_gb=max(1e-3, device.pass_s_per_byte * 1e9),  # above 0: the plan leaves it to the simulator
    )


def _core_rates(rank: int, world_size: int) -> CoreRates:
    dist.barrier()
    fp32, bf16 = (gemm_flops(CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    x, y = (torch.randn(ARRAY // 4) for _ in range(2))
    memory = 3 * ARRAY / _seconds(lambda: x + y)
    one, weight = torch.ones(4), torch.ones(4, requires_grad=True)

    def chain() -> None:
        z = weight
        for _ in range(50):
            z = z * one
        z.sum().backward()

    return CoreRates(fp32, bf16, memory, _seconds(chain) / 102)


def _collective_rate(rank: int, world_size: int) -> float:
    """Bytes/s that a rank sends in gloo's all-gather and all-reduce, half of the time each."""
    group = RankGroup(dist.group.WORLD)
    part, whole = torch.zeros(COLLECTIVE // 4 // world_size), torch.zeros(COLLECTIVE // 4)
    share = COLLECTIVE * (world_size - 1) / world_size
    gathers = _seconds(lambda: group.all_gather("bench", part))
    reduces = _seconds(lambda: group.all_reduce("bench", whole))
    return 3 * share / (gathers + reduces)


def _seconds(action: Callable[[], object]) -> float:
    """Median wall seconds of some runs, after one that warms up."""
    action()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return median(times)
