"""Curves out of a run's records: a metric's values by step, smoothed or thinned out, and the steps at which a run restarted."""

from __future__ import annotations

import itertools
from typing import Any

from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_events

SMOOTHING = 0.05
"""A smoothed curve averages over about this share of the run's steps."""


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have a finite value."""
    rows = [(record["step"], float(record[key])) for record in records if record.get(key) is not None]
    return [step for step, _ in rows], [value for _, value in rows]


def smooth(values: list[float], half: int | None = None) -> list[float]:
    """Mean of each value and up to `half` neighbours on either side (by default what SMOOTHING says); centred, so that the
    curve does not lag behind."""
    half = max(1, round(SMOOTHING * len(values) / 2)) if half is None else half
    sums = list(itertools.accumulate(values, initial=0.0))
    windows = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def thin(xs: list[float], ys: list[float], most: int) -> tuple[list[float], list[float]]:
    """At most about `most` of the points, in order: of every stretch its lowest and its highest, so that no spike is lost."""
    if len(xs) <= most:
        return xs, ys
    kept: set[int] = {0, len(xs) - 1}
    stretches = max(1, most // 2)
    for number in range(stretches):
        stretch = range(number * len(xs) // stretches, (number + 1) * len(xs) // stretches)
        kept |= {min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)}
    return [xs[i] for i in sorted(kept)], [ys[i] for i in sorted(kept)]


def restarts(run: RunDir, records: list[dict[str, Any]]) -> list[int]:
    """Steps from which the run was resumed, as far as they lie inside the picture."""
    steps = {event["step"] for event in read_events(run.events) if event.get("kind") == "resume" and "step" in event}
    return sorted(step for step in steps if step <= records[-1]["step"])
