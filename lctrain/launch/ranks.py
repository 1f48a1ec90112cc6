"""Run a function on several local gloo ranks and collect what each returns: for tests, benchmarks and `lctrain verify`.

Ranks are forked from the calling process after its imports, so a group of four starts in about a second, and a group is kept
for the next call with the same size, unless the calls so far have made many process groups: each keeps threads that never
rest. Children compute with one thread each: a forked child cannot use the OpenMP pool that its parent may already have started.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

MOST_PROCESS_GROUPS = 24
"""Made by one pool, those without a given rank included, after which it is not used again. With gloo each has three threads in
every member, one of which wakes up every 10 ms: a pool that served a hundred calls would leave no core for the next."""


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time; the message carries the trace of the first one that did."""


class RankPool:
    """`world_size` forked processes that share one gloo process group and wait for functions to run."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.process_groups = 1
        self.known_modules = frozenset(sys.modules)
        context = multiprocessing.get_context("fork")
        self._folder = tempfile.mkdtemp(prefix="lctrain-ranks-")
        rendezvous = f"file://{self._folder}/store"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, rendezvous, there, list(self._pipes)), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """`[fn(rank, world_size, *args) for every rank]`, run at the same time; `fn` must be importable by name."""
        order = pickle.dumps((fn, args))
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(order)
            except OSError:
                self.close()
                raise RankError(f"rank {rank} of {self.world_size} had died before the call") from None
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.world_size:
            open_pipes = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                waiting = sorted(set(range(self.world_size)) - set(answers))
                self.close()
                raise RankError(f"ranks {waiting} of {self.world_size} did not answer within {timeout_s:g} s")
            for done in ready:
                rank = next(rank for rank, own in enumerate(self._pipes) if own is done)
                try:
                    ok, value, groups = torch.load(io.BytesIO(self._pipes[rank].recv_bytes()), weights_only=False)
                except EOFError:
                    self.close()
                    raise RankError(f"rank {rank} of {self.world_size} died") from None
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank} of {self.world_size} raised:\n{value}")
                answers[rank], self.process_groups = value, max(self.process_groups, groups)
        return [answers[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes; a pool cannot be used again after this."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join(5)
        shutil.rmtree(self._folder, ignore_errors=True)
        if _pools.get(self.world_size) is self:
            del _pools[self.world_size]


_pools: dict[int, RankPool] = {}


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Run `fn(rank, world_size, *args)` on a shared pool of `world_size` gloo ranks; results in rank order.

    Raises RankError with the trace of the first rank that raised; the pool is then rebuilt on the next call.
    """
    pool = _pools.get(world_size)
    if pool is not None and fn.__module__ not in pool.known_modules:
        pool.close()  # forked before the function's module was imported: the children could not find it
        pool = None
    if pool is None:
        pool = _pools[world_size] = RankPool(world_size)
    answers = pool.run(fn, *args, timeout_s=timeout_s)
    if pool.process_groups > MOST_PROCESS_GROUPS:
        pool.close()
    return answers


@atexit.register
def close_pools() -> None:
    """End all shared pools."""
    for pool in list(_pools.values()):
        pool.close()


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection, inherited: list[Connection]) -> None:
    for other in inherited:  # held open here, they would keep siblings from seeing the parent's end
        other.close()
    _pools.clear()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            order = pipe.recv_bytes()
            try:
                fn, args = pickle.loads(order)
                ok, value = True, fn(rank, world_size, *args)
            except BaseException:
                ok, value = False, traceback.format_exc()
            buffer = io.BytesIO()
            torch.save((ok, value, dist.get_pg_count()), buffer)
            pipe.send_bytes(buffer.getvalue())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
