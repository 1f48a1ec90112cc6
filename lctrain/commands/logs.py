"""Show what a run has written: the log of its latest SLURM job, or of one of its ranks.

usage: lctrain logs RUN_DIR [rank=N] [lines=40] [follow=true]

  lctrain logs runs/demo follow=true
  lctrain logs runs/demo rank=3 lines=200

A run on this machine speaks to its terminal; here are its events and the logs of its ranks.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from lctrain.config.load import load
from lctrain.config.watch import LogsConfig, named_run
from lctrain.errors import UserError

LOOK_S = 0.5


def main(args: list[str]) -> int:
    """Run the command."""
    config = load(LogsConfig, "logs", named_run(args))
    path = _choose(config)
    if not path.exists() and not config.follow:
        raise UserError(f"{path} does not exist yet: the run has not started (lctrain status {config.run})")
    position = _show_last(path, config.lines)
    if config.follow:
        _follow(config, path, position)
    return 0


def _choose(config: LogsConfig) -> Path:
    from lctrain.launch.run_state import run_state, runs_below

    below = runs_below(config.run)
    if below != [config.run]:
        raise UserError(f"{config.run} has a sweep of {len(below)} runs: name one of them, such as {below[0]}")
    state = run_state(config.run)
    if config.rank is not None:
        path = state.run.rank_log(config.rank)
        if not path.exists():
            logs = sorted(log.name for log in state.run.log.glob("rank*.log"))
            raise UserError(f"rank={config.rank} has no log; {state.run.log} has {', '.join(logs) or 'none'}")
        return path
    if state.submission is None or state.current_job is None:
        return state.run.events
    # The first job of a chain that has not ended may not have begun: then the one before it has the last word.
    begun = [path for job in state.jobs if (path := state.submission.log(state.run, job.job)).exists()]
    return begun[-1] if begun else state.submission.log(state.run, state.current_job.job)


def _show_last(path: Path, lines: int) -> int:
    """Print the last lines of a file; returns the position after them."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        for line in deque(file, maxlen=lines):
            print(line.decode(errors="replace"), end="")
        print(end="", flush=True)
        return file.tell()


def _follow(config: LogsConfig, path: Path, position: int) -> None:
    """Print what is added, until the run has ended (asked rarely: the controller of a cluster is busy)."""
    from lctrain.launch.run_state import run_state

    asked = float("-inf")
    ended = False
    while True:
        if path.exists():
            with open(path, "rb") as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            print(text.decode(errors="replace"), end="", flush=True)
        if ended:
            return
        if time.monotonic() > asked + 20 * LOOK_S:
            state, asked = run_state(config.run), time.monotonic()
            job = state.current_job
            ended = job.ended if job is not None else state.holder is None
        time.sleep(LOOK_S)
