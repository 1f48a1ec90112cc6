"""From the passes of all ranks to what is reported: errors, medians, bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lctrain.bench.attention_problem import Gradients, Pass, Timing
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.schedule import Direction

DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


def errors(results: Gradients, exact: Gradients) -> dict[str, float | None]:
    """Largest error of each tensor over its largest entry; None where there is no tensor."""
    found: dict[str, float | None] = {}
    for name, x, y in zip(results._fields, results, exact, strict=True):
        found[name] = None if x is None or y is None else float((x.double() - y).abs().max() / y.abs().max())
    return found


def unsharded(layout: SequenceLayout, ranks: Sequence[Pass]) -> Gradients:
    """Whole tensors from the results of all ranks."""
    shards = [rank.results for rank in ranks if rank.results is not None]
    out, *gradients = (None if parts[0] is None else layout.unshard(parts, dim=1) for parts in zip(*shards, strict=True))
    assert out is not None
    return Gradients(out, *gradients)


def summary(passes: Sequence[Sequence[Pass]]) -> dict[str, Any]:
    """Medians and minima over all passes but the first, which pays for whatever happens only once."""
    timed = passes[1:]
    found: dict[str, Any] = {"memory_mib": max(rank.memory_mib for ranks in timed for rank in ranks)}
    forward, backward = ([_together([getattr(rank, way) for rank in ranks]) for ranks in timed] for way in DIRECTIONS)
    both = [None if b is None else Timing(f.wall + b.wall, f.cpu + b.cpu) for f, b in zip(forward, backward, strict=True) if f]
    for what, timings in (("forward", forward), ("backward", backward), ("both", both)):
        for clock in Timing._fields:
            values = [getattr(timing, clock) for timing in timings if timing is not None]
            found[f"{what}_{clock}_s"] = median(values) if values else None
            found[f"best_{what}_{clock}_s"] = min(values) if values else None
    return found


def plain(counted: Mapping[str, int]) -> dict[str, int]:
    """Without what is 0."""
    return {kind: count for kind, count in sorted(counted.items()) if count}


def _together(ranks: Sequence[Timing | None]) -> Timing | None:
    """Ranks that worked at the same time: the slowest one's wall time, everyone's CPU time."""
    timings = [rank for rank in ranks if rank is not None]
    return Timing(max(rank.wall for rank in timings), sum(rank.cpu for rank in timings)) if timings else None
