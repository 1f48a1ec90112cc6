"""Loss curves of several runs over each other, and how far apart they are.

python tools/overlay.py RUN RUN [RUN ...] [-o PICTURE.png]

Every run is compared, step by step, with the first run of the same model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

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


def first_of_its_model(runs: list[Path]) -> dict[str, str]:
    """Name of every run -> name of the first that has the same model."""
    firsts: dict[str, str] = {}
    return {run.name: firsts.setdefault(str(yaml.safe_load(RunDir(run).config.read_text())["model"]), run.name) for run in runs}


def draw(curves: dict[str, dict[int, float]], firsts: dict[str, str], picture: Path) -> None:
    """All curves in one plot, the first of a model broad and pale, later ones thin and dashed over it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(curves.items()):
        style = (
            {"linewidth": 5, "alpha": 0.35}
            if firsts[name] == name
            else {"linewidth": 1.6, "linestyle": (number * 2, (4, 2 * len(curves)))}
        )
        axes.plot(list(curve), list(curve.values()), label=name, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, handlelength=4)
    figure.savefig(picture)


def main() -> int:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, default=Path("overlay.png"), metavar="PICTURE.png")
    arguments = parser.parse_args()
    try:
        curves = {run.name: losses(run) for run in arguments.runs}
        firsts = first_of_its_model(arguments.runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = []
    for name, curve in curves.items():
        first = curves[firsts[name]]
        common = sorted(first.keys() & curve.keys())
        apart = max((abs(first[step] - curve[step]) for step in common), default=float("nan"))
        rows.append(
            (name, len(curve), f"{list(curve.values())[-1]:.4f}", "" if first is curve else f"{apart:.1e}", firsts[name])
        )
    table(("run", "steps", "last loss", "largest difference", "from"), rows, align="lrrrl")
    draw(curves, firsts, arguments.output)
    print(f"picture: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
