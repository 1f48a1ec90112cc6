"""End a run: it finishes its step, saves, and is not requeued; waiting jobs of it leave the queue.

usage: lctrain stop RUN_DIR [now=true]

  lctrain stop runs/demo
  lctrain stop runs/demo now=true     do not save

For runs on this machine and under SLURM; with the folder of a sweep, for all of its runs. The same `lctrain train` command
continues the run later.
"""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from lctrain.config.load import load
from lctrain.config.watch import StopConfig, named_run
from lctrain.errors import UserError

if TYPE_CHECKING:
    from lctrain.launch.run_state import RunState

SECOND_SIGNAL_S = 1.5
"""Between the signal that asks a launcher to end its run and the one that makes it kill; closer together they are one."""


def main(args: list[str]) -> int:
    """Run the command."""
    config = load(StopConfig, "stop", named_run(args))

    from lctrain.launch.run_state import run_state, runs_below

    for path in runs_below(config.run):
        state = run_state(path)
        if any(not job.ended for job in state.jobs):
            _stop_jobs(state, config.now)
        elif state.holder is not None:
            _stop_here(state, config)
        else:
            print(f"{path} is not running")
    return 0


def _stop_jobs(state: RunState, now: bool) -> None:
    from lctrain.launch.slurm_queue import cancel, signal_batch

    run = state.run
    waiting = [job.job for job in state.jobs if not job.ended and (now or job.state != "RUNNING")]
    running = [job.job for job in state.jobs if not job.ended and job.job not in waiting]
    if running:
        # Not scancel: that leaves the ranks only the cluster's KillWait, half a minute as a rule, to save.
        (run.slurm / "stop").touch()
    cancel(waiting[::-1])  # the last of a chain first, or the next one would start
    for job in running:
        signal_batch(job, "USR1")
        print(f"job {job} finishes its step, saves and ends; watch it with: lctrain status {run.path}")
    if waiting:
        print(f"cancelled: {', '.join(waiting)}")


def _stop_here(state: RunState, config: StopConfig) -> None:
    pid, _, host = (state.holder or "").partition(" on ")
    if host != os.uname().nodename or not pid.isdigit():
        raise UserError(f"{state.run.path} is trained by pid {state.holder}: give the command on that machine")
    _signal(int(pid))
    if config.now:
        time.sleep(SECOND_SIGNAL_S)
        _signal(int(pid))
    deadline = time.monotonic() + config.wait_s
    while _lives(int(pid)):
        if time.monotonic() > deadline:
            raise UserError(
                f"pid {pid} has not ended within wait_s={config.wait_s}: lctrain stop {config.run} now=true kills it"
            )
        time.sleep(0.1)
    print(f"{state.run.path}: pid {pid} has ended")


def _signal(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise UserError(f"pid {pid} belongs to another user, who has to stop it") from None


def _lives(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
