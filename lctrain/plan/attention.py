"""Seconds of an attention layer, from the simulator."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from statistics import fmean
from typing import Any

from lctrain.attention_choice import seen_by_cp
from lctrain.config.cluster import ClusterConfig
from lctrain.config.schema import TrainConfig
from lctrain.parallel.device import Rates
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.schedule import Direction
from lctrain.parallel.simulator import Cluster, simulate
from lctrain.parallel.strategy import Strategy
from lctrain.plan.step_time import StepTime

TABLES = ("forward", "backward", "causal_forward", "causal_backward")
"""Rates of a device."""


def attention_cluster(config: TrainConfig, cluster: ClusterConfig) -> Cluster:
    """What ranks of a sequence see (seen_by_cp), kernels in the run's arithmetic: as much faster or slower as products."""
    seen, device, dtype = seen_by_cp(config, cluster), cluster.device, config.engine.dtype
    assert device is not None
    if dtype == cluster.kernel.dtype:
        return seen
    factor = getattr(device.product_tflops, dtype) / getattr(device.product_tflops, cluster.kernel.dtype)
    tables: dict[str, Any] = {name: _times(getattr(seen.device, name), factor) for name in TABLES}
    return dataclasses.replace(seen, device=dataclasses.replace(seen.device, **tables))


@lru_cache(maxsize=512)
def attention_time(
    strategy: Strategy,
    layout: SequenceLayout,
    mask: AttentionMask,
    shape: AttentionShape,
    direction: Direction,
    cluster: Cluster,
) -> StepTime:
    """One direction of one layer, from the ranks' common start to the last one's end: means over the ranks."""
    ranks = simulate(strategy, layout, mask, shape, direction, cluster).ranks()
    return StepTime(
        attention=fmean(rank.compute for rank in ranks),
        attention_exchange=fmean(rank.exposed for rank in ranks),
        attention_idle=fmean(rank.idle for rank in ranks),
    )


def _times(rates: Rates, factor: float) -> Rates:
    return dataclasses.replace(rates, flops=tuple(tuple(rate * factor for rate in line) for line in rates.flops))
