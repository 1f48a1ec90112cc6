"""Seconds of an attention layer, from the simulator."""

from __future__ import annotations

from functools import lru_cache
from statistics import fmean

from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.schedule import Direction
from lctrain.parallel.simulator import Cluster, simulate
from lctrain.parallel.strategy import Strategy
from lctrain.plan.step_time import StepTime


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
