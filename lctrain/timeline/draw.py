"""Timelines as pictures: every rank has a lane for computing and narrower ones for what it sends and receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lctrain.timeline.bars import LANES, Bar, Phase
from lctrain.timeline.slots import lanes_of, slots_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "compute": "#33608c",
    "wait": "#ffffff",
    "kv": "#e29a3b",
    "q": "#7a9e4a",
    "out": "#b65a8f",
    "dout": "#9a86c9",
    "dq": "#4fa3a0",
    "dkv": "#c8573f",
    "lse": "#a8987a",
    "message": "#b9bec6",
}
NAMES = {
    "wait": "waiting",
    "kv": "keys, values",
    "q": "queries",
    "out": "output",
    "dout": "output gradients",
    "dq": "query gradients",
    "dkv": "key, value gradients",
    "lse": "log-sum-exp",
    "message": "received",
}
TOP = {"compute": (0.06, 0.42), "send": (0.52, 0.19), "receive": (0.75, 0.19)}
"""Of a rank's row, where each lane begins and how high it is."""
INK, PALE = "#2b2f36", "#f4f5f7"
MOST_RANKS = 16
LEAST_LABELLED = 0.03
"""Share of the picture's width from which on a bar has room for its step's number."""


def draw_timeline(title: str, phases: Sequence[Phase]) -> Figure:
    """One panel per phase, on a common scale of time."""
    from matplotlib.figure import Figure

    world = 1 + max(bar.rank for phase in phases for bar in phase.bars)
    shown = min(world, MOST_RANKS)
    total = sum(phase.seconds for phase in phases)
    figure = Figure(figsize=(13, 1.5 + (0.72 if shown <= 8 else 0.5) * shown), dpi=110, layout="constrained")
    widths = [max(phase.seconds, 0.12 * total) for phase in phases]
    panels = figure.subplots(1, len(phases), sharey=True, squeeze=False, width_ratios=widths)[0]
    for panel, phase in zip(panels, phases, strict=True):
        _draw_phase(panel, phase, shown, LEAST_LABELLED * total)
    panels[0].set_yticks([rank + 0.5 for rank in range(shown)], [f"rank {rank}" for rank in range(shown)])
    more = f", ranks 0 to {shown - 1} of {world}" if world > shown else ""
    figure.suptitle(title + more, fontsize=12.5, color=INK, x=0.012, ha="left", weight="bold")
    _legend(figure, {bar.kind for phase in phases for bar in phase.bars})
    return figure


def _draw_phase(axes: Axes, phase: Phase, shown: int, least_labelled: float) -> None:
    scale, unit = (1e3, "ms") if phase.seconds < 1 else (1.0, "s")
    for rank in range(shown):
        axes.axhspan(rank, rank + 1, color=PALE if rank % 2 else "white", linewidth=0, zorder=0)
    for (rank, lane), bars in lanes_of(phase.bars).items():
        if rank < shown:
            _draw_lane(axes, rank, lane, [bar for bar in bars if bar.end > bar.start], scale, least_labelled)
    busy = [sum(b.end - b.start for b in phase.bars if b.rank == rank and b.kind == "compute") for rank in range(shown)]
    share = sum(busy) / (shown * phase.seconds)
    axes.set_title(
        f"{phase.name}: {phase.seconds * scale:.3g} {unit}, {share:.0%} computing", fontsize=10.5, color=INK, loc="left"
    )
    axes.set_xlim(0, phase.seconds * scale)
    axes.set_ylim(shown, 0)
    axes.set_xlabel(unit, color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="x", color="#d5d8dd", linewidth=0.6, zorder=0.5)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_lane(axes: Axes, rank: int, lane: str, bars: list[Bar], scale: float, least_labelled: float) -> None:
    top, height = TOP[lane]
    placed = slots_of(bars)
    slots = 1 + max((slot for slot, _ in placed), default=0)
    each = height / slots
    for slot, bar in placed:
        waiting, y = bar.kind == "wait", rank + top + slot * each
        axes.barh(
            y, (bar.end - bar.start) * scale, each * (1 if lane == "compute" else 0.9), bar.start * scale, align="edge",
            color=_colour(bar.kind), edgecolor="#9aa1ab" if waiting else "white", linewidth=0.5 if bar.kind == "compute" else 0,
            hatch="////" if waiting else None, zorder=2,
        )  # fmt: skip
        if bar.kind == "compute" and bar.label and bar.end - bar.start > least_labelled:
            middle = (bar.start + bar.end) / 2 * scale
            axes.text(middle, y + each / 2, bar.label, color="white", fontsize=8, ha="center", va="center", zorder=3)


def _colour(kind: str) -> str:
    """A message of several kinds has the colour of the first."""
    return COLOURS[kind.split("+")[0]]


def _legend(figure: Figure, kinds: set[str]) -> None:
    from matplotlib.patches import Patch

    there = {part for kind in kinds for part in kind.split("+")}
    patches = [
        Patch(
            facecolor=colour,
            edgecolor="#9aa1ab" if kind == "wait" else "none",
            hatch="////" if kind == "wait" else None,
            label=NAMES.get(kind, kind),
        )
        for kind, colour in COLOURS.items()
        if kind in there
    ]
    lanes = f"each rank, from the top: {', '.join(LANES)}"
    figure.legend(
        handles=patches, loc="outside lower left", ncols=len(patches), frameon=False, fontsize=9, title=lanes, title_fontsize=9,
        alignment="left", labelcolor=INK,
    )  # fmt: skip
