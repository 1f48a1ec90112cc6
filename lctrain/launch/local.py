"""Start the ranks of a run on this machine and see them through to their end, whatever end that is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lctrain.config.schema import TrainConfig
from lctrain.launch.process import Process
from lctrain.launch.rank import Report, received, run_rank
from lctrain.launch.signals import Alarm, StopRequest, alarm_on_signals, signals_held
from lctrain.launch.watchdog import HANG_STATUS, hang_message
from lctrain.run_dir import RunDir, command_line
from lctrain.tracking.jsonl import append_event

SETTLE_S = 0.2
"""Ranks that die within this of the first one are looked at together: its peers may be collected before it."""
FAIL_ALONE_S = 2.0
"""What ranks get to notice a peer's death by themselves (gloo: under a second) and to close their files, before SIGTERM."""
CROWDED = 2
"""Processes per core beyond which the user is told that they take turns."""
KILL_S = 10.0
"""What the kernel gets to end a process after SIGKILL; it may be stuck in a file system that does not answer."""


@dataclasses.dataclass(frozen=True)
class End:
    """How a rank ended: `status` as in subprocess, negative for a signal."""

    rank: int
    pid: int
    status: int


def launch_local(entry: Callable[[TrainConfig, Process, str], int], config: TrainConfig) -> int:
    """Run `entry(config, process, rendezvous)` in `config.processes` forked processes; returns the exit status.

    0: all ranks returned 0, or were stopped before they trained. 2: a UserError. 1: a rank raised. 75: the watchdog ended the
    run. 128 + n: a rank was killed by signal n. Otherwise what the first rank to fail returned.

    Call it from the main thread, before this process has started threads, used CUDA or run a parallel region of torch: forked
    children inherit none of these. A stop signal is passed on once and the ranks end in their own time; a second one kills.
    Nothing started here is left behind, neither when this function raises nor when this process is killed.
    """
    run = RunDir(config.run_dir)
    with tempfile.TemporaryDirectory(prefix="lctrain-") as folder, StopRequest() as stop, alarm_on_signals() as alarm:
        ranks = _Ranks(run)
        try:
            ranks.start(entry, config, f"file://{folder}/rendezvous")
            return ranks.supervise(stop, alarm, config.launcher.grace_s)
        finally:
            ranks.kill()
            ranks.close()


class _Ranks:
    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.alive: dict[int, int] = {}
        self.ends: list[End] = []
        self.reports: dict[int, Report] = {}
        self.pipe, self._report_to = os.pipe()
        os.set_blocking(self.pipe, False)

    def start(self, entry: Callable[[TrainConfig, Process, str], int], config: TrainConfig, rendezvous: str) -> None:
        count, launcher = config.processes, os.getpid()
        cores = len(os.sched_getaffinity(0))
        threads = config.launcher.threads or max(1, cores // count)
        if count > CROWDED * cores and config.engine.device != "cuda":
            grid = " x ".join(f"parallel.{name}={size}" for name, size in config.grid.items() if size > 1)
            _say(f"{count} processes ({grid}) take turns on {cores} core{'s' if cores > 1 else ''}: right, but slow")
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(count):
            with signals_held():
                pid = os.fork()
                if pid == 0:
                    process = Process(rank, count, rank, count)
                    run_rank(entry, config, process, rendezvous, self._log(rank), threads, launcher, self._report_to)
                self.alive[rank] = pid

    def supervise(self, stop: StopRequest, alarm: Alarm, grace_s: float) -> int:
        """Wait for all ranks; every wait in here has an end, except for healthy ranks that nobody asked twice to stop."""
        failed_at: float | None = None
        status = 0
        passed_on = terminated = False
        while self.alive:
            now = time.monotonic()
            alarm.wait(1.0 if failed_at is None else 0.1)
            self._collect()
            if stop.requested and not passed_on and self.alive:
                passed_on = True
                _say(f"{stop.requested}: the ranks finish their step, save and end; once more ends them at once")
                self._signal(signal.Signals[stop.requested])
            if stop.insisted and self.alive:
                _say(f"{stop.requested} again: killing {_processes(len(self.alive))}")
                self.kill()
                return 128 + signal.Signals[stop.requested or "SIGTERM"]
            if failed_at is None and any(end.status for end in self.ends):
                failed_at = now
                self._settle()
                status = self._explain(self._first_cause(), stop.requested)
            if failed_at is not None and self.alive:
                if not terminated and now > failed_at + min(FAIL_ALONE_S, grace_s / 2):
                    terminated = True
                    self._signal(signal.SIGTERM)
                if now > failed_at + grace_s:
                    _say(f"{_list(self.alive)} did not end within {grace_s:g} s: killed")
                    self.kill()
        return status

    def _settle(self) -> None:
        """Collect the ranks that die together; while all have aborted, the one that made them is still to come."""
        began = time.monotonic()
        while self.alive:
            aborted = all(end.status == -signal.SIGABRT for end in self.ends if end.status)
            if time.monotonic() > began + (FAIL_ALONE_S if aborted else SETTLE_S):
                break
            time.sleep(0.01)
            self._collect()

    def kill(self) -> None:
        """End what is left, and wait for it."""
        self._signal(signal.SIGKILL)
        deadline = time.monotonic() + KILL_S
        while self.alive and time.monotonic() < deadline:
            self._collect()
            time.sleep(0.005)
        if self.alive:
            _say(f"{_list(self.alive)} cannot be killed (stuck in the kernel, perhaps on a dead file system)")
            self.alive.clear()

    def close(self) -> None:
        os.close(self.pipe)
        os.close(self._report_to)

    def _collect(self) -> None:
        for rank, pid in list(self.alive.items()):
            done, wait_status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.alive[rank]
                self.ends.append(End(rank, pid, os.waitstatus_to_exitcode(wait_status)))
        for report in received(self.pipe):
            self.reports[report.rank] = report

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _first_cause(self) -> End:
        """Of the ranks that failed together, the one whose end explains the others'.

        A killed rank cannot say when it died, but exceptions are its peers' answer to that; an abort, on the other hand, is how
        communication libraries answer the death of a peer.
        """

        def order(end: End) -> tuple[int, float]:
            if report := self.reports.get(end.rank):
                return 1, report.time
            return (2 if end.status == -signal.SIGABRT else 0), 0.0

        return min((end for end in self.ends if end.status), key=order)

    def _explain(self, end: End, requested: str | None) -> int:
        """Say once what went wrong; returns the exit status that stands for it."""
        name = f"rank {end.rank} (pid {end.pid})"
        report = self.reports.get(end.rank)
        peers = len(self.alive) + sum(other.status != 0 for other in self.ends) - 1
        others = f"; stopping the other {_processes(peers)}" if peers else ""
        again = f"; continue with: {command_line(without='resume')}"
        log = self._log(end.rank)
        if report and report.by_user:
            line, status = f"error: {report.message}", 2
        elif report:
            line, status = f"{name} failed: {report.message}{others}" + (f"; trace in {log}" if log else ""), end.status
        elif end.status < 0:
            killer = signal.Signals(-end.status).name
            line, status = f"{name} was killed by {killer}{others}{again}", 128 - end.status
            if killer == requested:  # only a rank that does not train yet dies of it: there is nothing to save
                _say(f"stopped by {killer} before training began")
                return 0
        elif end.status == HANG_STATUS and (message := hang_message(self.run.events)):
            line, status = f"{message}{again}", HANG_STATUS
        else:
            line, status = f"{name} ended with status {end.status}{others}" + (f"; see {log}" if log else ""), end.status
        _say(line)
        if self.run.path.is_dir():
            with contextlib.suppress(OSError):
                append_event(self.run.events, "failure", rank=end.rank, pid=end.pid, status=status, message=line)
        return status

    def _log(self, rank: int) -> Path | None:
        return self.run.rank_log(rank) if self.run.path.is_dir() else None


def _say(line: str) -> None:
    # A rank that was killed while it drew a progress bar leaves the cursor hidden and the line unfinished.
    with contextlib.suppress(OSError):
        print(("\r\x1b[K\x1b[?25h" if sys.stderr.isatty() else "") + line, file=sys.stderr, flush=True)


def _processes(count: int) -> str:
    return "process" if count == 1 else f"{count} processes"


def _list(alive: dict[int, int]) -> str:
    return ", ".join(f"rank {rank} (pid {pid})" for rank, pid in alive.items())
