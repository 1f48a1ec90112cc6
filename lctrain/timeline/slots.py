"""Bars that overlap in one lane go side by side."""

from __future__ import annotations

from collections.abc import Sequence

from lctrain.timeline.bars import Bar


def lanes_of(bars: Sequence[Bar]) -> dict[tuple[int, str], list[Bar]]:
    """Bars by rank and lane."""
    lanes: dict[tuple[int, str], list[Bar]] = {}
    for bar in bars:
        lanes.setdefault((bar.rank, bar.lane), []).append(bar)
    return lanes


def slots_of(bars: Sequence[Bar]) -> list[tuple[int, Bar]]:
    """Each bar with the lowest slot that is free when it starts, by start."""
    ends: list[float] = []
    found = []
    for bar in sorted(bars, key=lambda bar: (bar.start, bar.end)):
        free = next((slot for slot, end in enumerate(ends) if end <= bar.start), len(ends))
        ends[free:] = [bar.end, *ends[free + 1 :]]
        found.append((free, bar))
    return found
