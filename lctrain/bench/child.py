"""A contender in a process of its own, so that nothing else adds to its time or memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

EXIT_S = 10.0


class ChildError(RuntimeError):
    """A child raised or died; the message carries its trace."""


class Child:
    """A fresh Python process that holds one object and calls its methods on demand.

    Args:
        make: importable by name; `make(*args)` is called in the new process, after torch was told its threads.
    """

    def __init__(self, make: Callable[..., Any], threads: int, *args: Any) -> None:
        # Spawned: a forked child would start with the memory of this process, and could not use an OpenMP pool started here.
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, threads, args), daemon=True)
        self._process.start()
        there.close()
        self._answer()

    def call(self, method: str, *args: Any) -> Any:
        """What `method(*args)` of the child's object returns (picklable)."""
        self._pipe.send_bytes(pickle.dumps((method, args)))
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(EXIT_S)
        self._process.kill()
        self._process.join(EXIT_S)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            good, value = pickle.loads(self._pipe.recv_bytes())
        except EOFError:
            self._process.join(EXIT_S)
            status = self._process.exitcode
            hint = " (killed: probably out of memory)" if status == -9 else ""
            raise ChildError(f"a benchmark process died with status {status}{hint}") from None
        if not good:
            raise ChildError(f"a benchmark process raised:\n{value}")
        return value


def _serve(pipe: Connection, make: Callable[..., Any], threads: int, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            held = make(*args)
            answer: Any = None
            while True:
                # Bytes, not objects: multiprocessing would put tensors into shared memory, of which there may be little.
                pipe.send_bytes(pickle.dumps((True, answer)))
                method, arguments = pickle.loads(pipe.recv_bytes())
                answer = getattr(held, method)(*arguments)
        except (EOFError, BrokenPipeError):
            raise
        except Exception:
            pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
