"""Show which processes form which groups in a parallel layout.

usage: lctrain mesh [override of lctrain train ...]

  lctrain mesh parallel.cp=2 parallel.dp=4
  lctrain mesh model=hybrid_tiny engine=megatron parallel.tp=2 parallel.pp=2 parallel.cp=2 parallel.ep=4
  lctrain mesh launcher.processes=64 parallel.cp=16
"""

from __future__ import annotations

from lctrain.config.load import load
from lctrain.config.schema import TrainConfig

SHARED = {
    "pp": "successive layers",
    "dp": "weights; each has sequences of its own",
    "cp": "a sequence",
    "tp": "every matrix",
    "edp": "copies of the same experts",
    "ep": "the experts of a mixture",
    "etp": "every matrix of an expert",
}
SHOWN = 8
"""Groups of a dimension that are printed."""


def main(args: list[str]) -> int:
    """Run the command."""
    config = load(TrainConfig, "train", args)
    from lctrain.console import say, table

    mesh = config.mesh(0, config.processes)
    say(str(mesh))
    lines = []
    for name, what in SHARED.items():
        size = getattr(mesh, name)
        if size == 1:
            continue
        groups = [" ".join(map(str, group)) for group in mesh.partition(name)]
        more = f" | and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
        lines.append((name, size, what, " | ".join(groups[:SHOWN]) + more))
    if lines:
        say()
        table(("dimension", "size", "its ranks share", "groups"), lines, align="lrll")
    return 0
