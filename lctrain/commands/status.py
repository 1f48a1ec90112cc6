"""Show what a run is doing: queue, step, time left, last checkpoint, restarts.

usage: lctrain status RUN_DIR

  lctrain status runs/demo

For runs on this machine and under SLURM; with the folder of a sweep, for all of its runs.
"""

from __future__ import annotations

from lctrain.config.load import load
from lctrain.config.watch import StatusConfig, named_run


def main(args: list[str]) -> int:
    """Run the command."""
    config = load(StatusConfig, "status", named_run(args))

    from lctrain.console import say
    from lctrain.launch.run_state import describe, run_state, runs_below

    for number, path in enumerate(runs_below(config.run)):
        if number:
            say()
        for what, text in describe(run_state(path)):
            say(f"{what:<11}{text}")
    return 0
