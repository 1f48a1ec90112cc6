"""A picture of a run: loss on top, learning rate and gradient norm below, restarts marked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lctrain.errors import UserError
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_metrics
from lctrain.tracking.series import restarts, series, smooth

BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9662b", "#3a8f5c", "#777777"


def plot_loss(run: RunDir) -> Path:
    """Draw `<run_dir>/loss.png` from metrics.jsonl and events.jsonl and return its path; UserError if no step was recorded."""
    from matplotlib.figure import Figure

    records = [record for record in read_metrics(run.metrics) if "step" in record]
    if not records:
        raise UserError(f"{run.metrics} has no finished step to plot")
    figure = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=(4, 1.3, 1.3))
    top = figure.add_subplot(grid[0])
    rate, norm = figure.add_subplot(grid[1], sharex=top), figure.add_subplot(grid[2], sharex=top)

    steps, losses = series(records, "loss")
    marker = "o" if len(steps) == 1 else None
    top.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=0.9, marker=marker, label="train")
    if len(losses) >= 10:
        top.plot(
            steps,
            smooth(losses),
            color=BLUE,
            linewidth=1.8,
            label="train, smoothed",
        )
    top.plot(*series(records, "eval_loss"), color=ORANGE, marker="o", markersize=4, linewidth=1.2, label="held-out")
    skipped = [record["step"] for record in records if record.get("skipped")]
    if skipped:
        top.plot(
            skipped, [1.0] * len(skipped), "x", color="red", transform=top.get_xaxis_transform(), clip_on=False, label="skipped"
        )
    rate.plot(*series(records, "lr"), color=GREEN, linewidth=1.2)
    norm.plot(*series(records, "grad_norm"), color=GREY, linewidth=0.9)

    for number, step in enumerate(restarts(run, records)):
        for axes in (top, rate, norm):
            axes.axvline(
                step, color="black", linestyle=":", linewidth=1, label="restart" if axes is top and not number else None
            )
    top.set_ylabel("loss (nats per token)")
    top.set_title(run.path.resolve().name, loc="left", fontsize=11)
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    norm.set_ylabel("grad norm")
    norm.set_xlabel("step")
    for axes in (top, rate, norm):
        axes.grid(color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    for axes in (top, rate):
        axes.tick_params(labelbottom=False)
    named = [line for line in top.get_lines() if not str(line.get_label()).startswith("_")]
    top.legend(handles=[line for line in named if np.size(line.get_xdata())], frameon=False, fontsize=9)
    figure.align_ylabels([top, rate, norm])
    figure.savefig(run.plot)
    return run.plot
