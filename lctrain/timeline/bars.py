"""Bars: what every timeline is made of, wherever its times come from."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lctrain.parallel.simulator import Timeline

Lane = Literal["compute", "send", "receive"]
LANES: tuple[Lane, ...] = ("compute", "send", "receive")


class Bar(NamedTuple):
    """Something that one rank does for a while, in seconds from the start.

    kind: "compute", "wait", or what a message carries, joined by +. label: a few words for it.
    """

    rank: int
    lane: Lane
    start: float
    end: float
    kind: str
    label: str


class Phase(NamedTuple):
    """One direction: its name, how long it took all ranks, and what happened."""

    name: str
    seconds: float
    bars: tuple[Bar, ...]


def simulated(name: str, timeline: Timeline) -> Phase:
    """The bars of a simulation; messages from first byte to last."""
    bars = [Bar(c.rank, "compute", c.start, c.end, "compute", str(c.step)) for c in timeline.computed]
    bars += [Bar(w.rank, "compute", w.start, w.end, "wait", "wait") for w in timeline.waited]
    for moved in timeline.moved:
        kind = "+".join(moved.kinds)
        bars.append(Bar(moved.source, "send", moved.start, moved.end, kind, f"{kind} to {moved.target}"))
        bars.append(Bar(moved.target, "receive", moved.start, moved.end, kind, f"{kind} from {moved.source}"))
    return Phase(name, timeline.seconds, tuple(bars))
