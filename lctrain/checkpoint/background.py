"""Saving while the run goes on: a thread copies the state, writes and publishes it; only the next update waits for the copy."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from lctrain.checkpoint.agree import agreed, is_distributed
from lctrain.checkpoint.host_copy import HostBuffers, HostCopy
from lctrain.checkpoint.state import State, tensors_of, values_of
from lctrain.checkpoint.store import CheckpointStore

PATIENCE = timedelta(hours=2)
"""How long a writer waits for another rank's: a slow disk is no fault."""


class Saved(NamedTuple):
    """A checkpoint that exists. seconds: from the call to its publication. stall_s: what the run waited for it."""

    step: int
    path: Path
    seconds: float
    stall_s: float


@dataclasses.dataclass
class _Save:
    """A save in the background. The run's thread counts what it waits; the writer's says when the checkpoint exists."""

    step: int
    began: float
    copy: HostCopy
    stall_s: float = 0.0
    path: Path | None = None
    seconds: float = 0.0


class Saver:
    """Saves into a store, at once or in the background.

    In the background: `save` waits for the checkpoint before and returns. A thread copies the state into host buffers (kept for
    the next time, pinned for CUDA), writes, hashes and publishes as CheckpointStore.save does, with collectives on a gloo group
    of its own, so that they never mix with those of the steps. Whoever is about to change the state calls `before_change`,
    which waits for the copy. An error, the same on all ranks, is raised by the next `save` or `wait`; `failed` tells on this
    rank that there is one.

    Collective to make, and `save` and `wait` must be called by all ranks alike.
    """

    def __init__(self, store: CheckpointStore, asynchronous: bool) -> None:
        self.store, self.asynchronous = store, asynchronous
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if asynchronous and is_distributed() else None
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._current: _Save | None = None
        self._error: BaseException | None = None
        self._finished: list[Saved] = []

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and nobody has been told yet."""
        return self._error is not None

    def save(self, step: int, state: State, meta: dict[str, Any], began: float | None = None) -> None:
        """See CheckpointStore.save. began: time.perf_counter() before the state was made, if that is to count too.

        In the background, tensors of `state` may be the run's own; everything else is copied now.
        UserError of this checkpoint or, in the background, of the one before.
        """
        began = time.perf_counter() if began is None else began
        if not self.asynchronous:
            path = self.store.save(step, state, meta)
            seconds = time.perf_counter() - began
            self._finished.append(Saved(step, path, seconds, seconds))
            return
        self.wait()
        save = self._current = _Save(step, began, HostCopy(tensors_of(state), self._buffers))
        arguments = (save, copy.deepcopy(values_of(state)), copy.deepcopy(meta))
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        save.stall_s = time.perf_counter() - began

    def before_change(self) -> None:
        """Return once the tensors of the last state that was saved may change. Not collective, and raises nothing."""
        if self._current is not None:
            began = time.perf_counter()
            self._current.copy.wait()
            self._current.stall_s += time.perf_counter() - began

    def wait(self) -> None:
        """Return once nothing is being written; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._note_finished()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finished(self) -> list[Saved]:
        """The checkpoints that were published since the last call."""
        self._note_finished()
        finished, self._finished = self._finished, []
        return finished

    def _note_finished(self) -> None:
        save = self._current
        if save is not None and save.path is not None:
            self._finished.append(Saved(save.step, save.path, save.seconds, save.stall_s))
            self._current = None

    def _write(self, save: _Save, values: State, meta: dict[str, Any]) -> None:
        try:
            tensors = agreed(save.copy.run, self._group)
            path = self.store.write(save.step, tensors, values, meta, self._group)
            save.seconds = time.perf_counter() - save.began
            save.path = path
        except BaseException as error:  # handed to the main thread, which raises it
            self._error = error
