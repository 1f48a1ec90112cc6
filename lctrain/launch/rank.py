"""What a freshly forked rank does before, around and after the training function."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError
from lctrain.launch.process import Process
from lctrain.launch.signals import default_signals

_PR_SET_PDEATHSIG = 1
_LONGEST_MESSAGE = 2000  # with its frame below PIPE_BUF (4096 bytes), so that reports of several ranks never mix


@dataclasses.dataclass(frozen=True)
class Report:
    """Why a rank failed, as it tells its launcher; `time` is the machine's monotonic clock."""

    rank: int
    time: float
    by_user: bool
    message: str

    def send(self, pipe: int) -> None:
        os.write(pipe, json.dumps(dataclasses.asdict(self)).encode() + b"\n")


def received(pipe: int) -> list[Report]:
    """The reports that wait in a non-blocking pipe."""
    try:
        text = os.read(pipe, 1 << 20)
    except BlockingIOError:
        return []
    return [Report(**json.loads(line)) for line in text.splitlines()]


def run_rank(
    entry: Callable[[TrainConfig, Process, str], int],
    config: TrainConfig,
    process: Process,
    rendezvous: str,
    log: Path | None,
    threads: int,
    launcher: int,
    reports: int,
) -> NoReturn:
    """Run `entry` in this forked process and leave: status 0 or what entry returns, 2 after a UserError, 1 after any other.

    The trace of an error goes to the log and one line of it through the pipe `reports`: most ranks fail only because a peer
    did, and the launcher, which sees who was first, shows that one alone.
    """
    status = 1
    try:
        default_signals()
        _end_with(launcher)
        redirect(process, log)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
        status = int(entry(config, process, rendezvous) or 0)
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except UserError as error:
        Report(process.rank, time.monotonic(), True, str(error)[:_LONGEST_MESSAGE]).send(reports)
        status = 2
    except BaseException as error:
        Report(process.rank, time.monotonic(), False, one_line(error)[:_LONGEST_MESSAGE]).send(reports)
        write_trace(log)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
                stream.flush()
        os._exit(status)  # neither the parent's exit handlers nor its open contexts may run here


def _end_with(launcher: int) -> None:
    """Get SIGTERM when the launcher dies, however it dies: ranks then save and end instead of running on unseen."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:  # it died before the call above
        os._exit(128 + signal.SIGTERM)


def end_with_torchrun() -> None:
    """The same for a rank that torchrun has started: nobody would hear of its end any more."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with(os.getppid())


def redirect(process: Process, log: Path | None) -> None:
    """Rank 0 speaks to the terminal and the others to their logs; nobody waits for keys; a fatal signal leaves a trace."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if log is None:
        faulthandler.enable()
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(target, f"--- {started} rank {process.rank} of {process.world_size}, pid {os.getpid()}\n".encode())
    faulthandler.enable(target)
    if process.rank > 0:
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def one_line(error: BaseException) -> str:
    """`ValueError: what it says (file.py:12)`, with the innermost place in lctrain's own code if there is one."""
    text = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}lctrain{os.sep}" in frame.filename and frame.filename != __file__]
    place = (own or frames)[-1]
    return f"{text} ({os.path.basename(place.filename)}:{place.lineno})"


def write_trace(log: Path | None) -> None:
    """Append the trace of the exception being handled to the log, or write it to stderr."""
    trace = traceback.format_exc()
    if log is None:
        sys.stderr.write(trace)
    else:
        with open(log, "a") as file:
            file.write(trace)
