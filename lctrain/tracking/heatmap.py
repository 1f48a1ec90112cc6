"""A picture of how evenly experts were used: the load of every expert at the end, and each layer's worst over the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_metrics

KINDS = {"moe": ("Experts", "expert"), "moh": ("Routed heads", "head")}
"""Prefix of the metrics -> title and name of what is chosen."""

MOST_COLUMNS = 400
"""Steps shown side by side; of longer runs, evenly spaced ones."""


def plot_load(run: RunDir) -> Path | None:
    """Draw `<run_dir>/experts.png` from metrics.jsonl and return its path; None if no layer of the run chooses anything."""
    records = [record for record in read_metrics(run.metrics) if "step" in record]
    kinds = [kind for kind in KINDS if any(record.get(f"{kind}_load") for record in records)]
    if not kinds:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6 * len(kinds)), dpi=110, layout="constrained")
    rows = figure.subplots(len(kinds), 2, squeeze=False)
    for kind, (left, right) in zip(kinds, rows, strict=True):
        _last_load(figure, left, records, kind)
        _violations(figure, right, records, kind)
    figure.savefig(run.expert_load)
    return run.expert_load


def _last_load(figure: Any, axes: Any, records: list[dict[str, Any]], kind: str) -> None:
    """Layers x experts, 1 where the use is even."""
    last = next(record for record in reversed(records) if record.get(f"{kind}_load"))
    load = np.array(last[f"{kind}_load"], dtype=float)
    relative = load * load.shape[1]
    title, chosen = KINDS[kind]
    picture = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
    axes.set_title(f"{title}: load at step {last['step']}, 1 is even", loc="left", fontsize=10)
    axes.set_xlabel(chosen)
    axes.set_ylabel("layer with a choice")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, ax=axes, extend="max")


def _violations(figure: Any, axes: Any, records: list[dict[str, Any]], kind: str) -> None:
    """Layers x steps: how far the busiest is above the mean."""
    key = f"{kind}_max_violation"
    rows = [record for record in records if record.get(key)]
    rows = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, MOST_COLUMNS).round().astype(int))]
    values = np.array([record[key] for record in rows], dtype=float).T
    first, last = rows[0]["step"], rows[-1]["step"]
    extent = (first - 0.5, last + 0.5, len(values) - 0.5, -0.5)
    picture = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest", extent=extent)
    axes.set_title("Max violation: largest load over mean, minus 1", loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(picture, ax=axes)
