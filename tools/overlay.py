"""Loss curves of several runs over each other, and how far apart they are.

python tools/overlay.py RUN RUN [RUN ...] [-o PICTURE.png]

The first run is the one that the others are compared with, step by step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lctrain.console import table
from lctrain.errors import UserError
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_metrics


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, the last word on each step; UserError if the folder is no run."""
    metrics = RunDir(run).metrics
    if not metrics.exists():
        raise UserError(f"{run} is no run directory: it has no {metrics.name}")
    return {record["step"]: record["loss"] for record in read_metrics(metrics) if "loss" in record}


def draw(curves: dict[str, dict[int, float]], picture: Path) -> None:
    """All curves in one plot, later ones thinner and dashed, so that the ones below stay visible."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(curves.items()):
        style = (
            {"linewidth": 5, "alpha": 0.35}
            if not number
            else {"linewidth": 1.6, "linestyle": (number * 2, (4, 2 * len(curves)))}
        )
        axes.plot(list(curve), list(curve.values()), label=name, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(picture)


def main() -> int:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, default=Path("overlay.png"), metavar="PICTURE.png")
    arguments = parser.parse_args()
    try:
        curves = {run.name: losses(run) for run in arguments.runs}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    first = next(iter(curves.values()))
    rows = []
    for name, curve in curves.items():
        common = sorted(first.keys() & curve.keys())
        apart = max((abs(first[step] - curve[step]) for step in common), default=float("nan"))
        rows.append((name, len(curve), f"{list(curve.values())[-1]:.4f}", f"{apart:.1e}"))
    table(("run", "steps", "last loss", "largest difference"), rows, align="lrrr")
    draw(curves, arguments.output)
    print(f"picture: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
