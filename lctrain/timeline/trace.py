"""Timelines as Chrome traces: open the file in Perfetto or in chrome://tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lctrain.timeline.bars import LANES, Phase
from lctrain.timeline.slots import lanes_of, slots_of

TRACKS = 64
"""Tracks set aside for the overlapping messages of one lane."""


def chrome_trace(title: str, phases: Sequence[Phase]) -> dict[str, Any]:
    """A process per rank with tracks for computing, sending and receiving; phases one after the other, times in us."""
    events: list[dict[str, Any]] = []
    begin = 0.0
    for phase in phases:
        for (rank, lane), bars in lanes_of(phase.bars).items():
            for slot, bar in slots_of(bars):
                track = LANES.index(lane) * TRACKS + slot
                name = f"step {bar.label}" if bar.kind == "compute" and bar.label else bar.label or bar.kind
                times = {"ts": (begin + bar.start) * 1e6, "dur": (bar.end - bar.start) * 1e6}
                events.append({"name": name, "cat": phase.name, "ph": "X", "pid": rank, "tid": track, **times})
        begin += phase.seconds
    tracks = {(event["pid"], event["tid"]) for event in events}
    for rank in sorted({rank for rank, _ in tracks}):
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
    for rank, track in sorted(tracks):
        events.append({"name": "thread_name", "ph": "M", "pid": rank, "tid": track, "args": {"name": LANES[track // TRACKS]}})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": title}}
