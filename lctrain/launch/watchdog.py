"""A run that has come to a standstill is ended, with the name of the rank that the others wait for."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.launch.posts import Post, diagnose, place_of, read_posts
from lctrain.tracking.jsonl import append_event

if TYPE_CHECKING:
    from lctrain.run_dir import RunDir

HANG_STATUS = 75
"""Exit status of a rank whose watchdog ended it, and of a run that ended so (EX_TEMPFAIL: trying again may help)."""
HANG = "hang"
"""Kind of the event."""
LONGEST_POST_S = 10.0


class Watchdog:
    """A thread that ends this process with HANG_STATUS once its main thread has made no progress for `limit_s` seconds.

    Progress is a new phase (`phase`), or a layer that begins its forward pass. Before the end, the stacks of all threads go to
    the rank's log, and one rank says which one they wait for: in an event, and on stderr if nobody else will (`speak`).

    Use as a context manager around all that a rank does; limit_s=0 makes it do nothing.
    """

    def __init__(self, rank: int, ranks: int, limit_s: float, speak: bool, meeting_place: str = "") -> None:
        self._rank, self._ranks, self._limit_s, self._speak = rank, ranks, limit_s, speak
        self._meeting_place = meeting_place
        self._interval_s = min(LONGEST_POST_S, max(0.2, limit_s / 50))
        self._run: RunDir | None = None
        self._phase, self._since = "start", time.monotonic()
        self._step: int | None = None
        self._number = 0
        self._ended = threading.Event()
        self._main = threading.get_ident()
        self._hook: Any = None

    def phase(self, name: str, step: int | None = None) -> None:
        """What the main thread does from now on; `step` counts from 1."""
        self._phase, self._step, self._since = name, step, time.monotonic()

    def post_to(self, run: RunDir) -> None:
        """From now on the ranks of this run can see each other's posts."""
        run.log.mkdir(parents=True, exist_ok=True)
        (run.log / f"rank{self._rank}.post").unlink(missing_ok=True)
        self._run = run
        self._post(expired=False)

    def watch_layers(self) -> None:
        """Count the beginning of every module's forward pass as progress: long steps of many layers are no standstill."""
        if self._limit_s:
            from torch.nn.modules.module import register_module_forward_pre_hook

            def note(module: Any, args: Any) -> None:
                self._since = time.monotonic()

            self._hook = register_module_forward_pre_hook(note)

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")  # before any process group is made
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._hook is not None:
            self._hook.remove()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            if time.monotonic() - self._since > self._limit_s:
                self._end_process()
            self._post(expired=False)

    def _post(self, expired: bool) -> Post:
        self._number += 1
        idle_s = round(time.monotonic() - self._since, 1)
        place, waits = place_of(self._main)
        now = self._number, self._phase, self._step, idle_s, place, waits, expired
        post = Post(self._rank, os.getpid(), os.uname().nodename, *now)
        if self._run is not None:
            with contextlib.suppress(OSError):  # a full disk is not a standstill
                post.write(self._run.log)
        return post

    def _end_process(self) -> None:
        mine = self._post(expired=True)
        self._dump_stacks(mine)
        if self._run is None:
            self._say(f"no progress for {mine.idle_s:.0f} s: {mine.name} is in {mine.where}{self._meeting_place}")
            os._exit(HANG_STATUS)
        before = read_posts(self._run.log, self._ranks)
        # Twice the longest time between two posts: whoever has not posted by then does not.
        self._keep_posting(2 * self._interval_s)
        after = read_posts(self._run.log, self._ranks)
        answering = [post.rank for rank, post in after.items() if post.expired and post.number != before.get(rank, mine).number]
        if self._rank == min([self._rank, *answering]):
            self._say(f"no progress for {mine.idle_s:.0f} s: {diagnose(before, after, self._ranks)}; stacks in {self._run.log}")
        else:
            self._keep_posting(2 * self._interval_s)  # the one that speaks is to end first: its status is looked at
        os._exit(HANG_STATUS)

    def _keep_posting(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(self._interval_s / 2)
            self._post(expired=True)

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            if self._run is not None:
                append_event(self._run.events, HANG, rank=self._rank, message=line)
            if self._speak or self._run is None:
                os.write(2, f"{line}\n".encode())

    def _dump_stacks(self, mine: Post) -> None:
        with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as held:
            log = held.enter_context(open(self._run.rank_log(self._rank), "a")) if self._run else sys.stderr
            log.write(f"--- watchdog: no progress for {mine.idle_s:.0f} s in {mine.where}; all threads:\n")
            log.flush()
            faulthandler.dump_traceback(log, all_threads=True)
            if trace := _flight_record():
                log.write(f"--- latest collectives (torch's flight recorder): {trace}\n")


def hang_message(events: Path) -> str | None:
    """What the watchdog that spoke last has said."""
    from lctrain.tracking.jsonl import read_events

    messages = [event["message"] for event in read_events(events) if event["kind"] == HANG]
    return messages[-1] if messages else None


def _flight_record() -> str:
    """The last collectives of this process as torch recorded them (NCCL, and gloo where torch does), or nothing."""
    import json

    with contextlib.suppress(Exception):  # it is private, and only a help
        from torch._C import _distributed_c10d

        entries = json.loads(vars(_distributed_c10d)["_dump_fr_trace_json"](True, False)).get("entries", [])
        kept = ("profiling_name", "state", "collective_seq_id", "p2p_seq_id", "input_sizes", "process_group")
        return json.dumps([{key: entry.get(key) for key in kept} for entry in entries[-8:]])
    return ""
