"""Saving while the run goes on: the step waits for a copy to host memory, a thread does the rest."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lctrain.checkpoint.agree import is_distributed
from lctrain.checkpoint.state import State, tensors_of, values_of
from lctrain.checkpoint.store import CheckpointStore

PATIENCE = timedelta(hours=2)
"""How long a writer waits for another rank's: a slow disk is no fault."""


COPIERS = 4
"""Threads that copy to host memory, at most: a few saturate it."""


class Saved(NamedTuple):
    """A checkpoint that exists. seconds: from the call to its publication. stall_s: what the run waited of these."""

    step: int
    path: Path
    seconds: float
    stall_s: float


class Saver:
    """Saves into a store, at once or in the background.

    In the background: `save` waits for the checkpoint before, copies the state into host buffers (kept for the next time;
    pinned if `pin`) and returns. A thread writes, hashes and publishes as CheckpointStore.save does, with collectives on a gloo
    group of its own, so that they never mix with those of the steps. Its error, the same on all ranks, is raised by the next
    call; `failed` tells on this rank that there is one.

    Collective to make, and `save` and `wait` must be called by all ranks alike.
    """

    def __init__(self, store: CheckpointStore, asynchronous: bool, pin: bool = False) -> None:
        self.store, self.asynchronous = store, asynchronous
        self._pin = pin
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if asynchronous and is_distributed() else None
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finished: list[Saved] = []

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written and nobody has been told yet."""
        return self._error is not None

    def save(self, step: int, state: State, meta: dict[str, Any], began: float | None = None) -> None:
        """See CheckpointStore.save. began: time.perf_counter() before the state was made, if that is to count too.

        UserError of this checkpoint or, in the background, of the one before.
        """
        began = time.perf_counter() if began is None else began
        if not self.asynchronous:
            path = self.store.save(step, state, meta)
            seconds = time.perf_counter() - began
            self._finished.append(Saved(step, path, seconds, seconds))
            return
        self.wait()
        tensors, values = self._copied(tensors_of(state)), copy.deepcopy(values_of(state))
        stall_s = time.perf_counter() - began
        arguments = (step, tensors, values, copy.deepcopy(meta), began, stall_s)
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is being written; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finished(self) -> list[Saved]:
        """The checkpoints that were published since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def _write(
        self, step: int, tensors: dict[str, torch.Tensor], values: State, meta: dict[str, Any], began: float, stall_s: float
    ) -> None:
        try:
            path = self.store.write(step, tensors, values, meta, self._group)
            self._finished.append(Saved(step, path, time.perf_counter() - began, stall_s))
        except BaseException as error:  # handed to the main thread, which raises it
            self._error = error

    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same tensors in host memory that the run does not touch."""
        copied, pairs = {}, []
        for name, tensor in tensors.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                pin = self._pin and local.is_cuda and local.numel() > 0
                buffer = self._buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pin)
            pairs.append((buffer, local))
            # Not from_local: it would move the copy back to the mesh's device.
            copied[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
        copiers = min(COPIERS, torch.get_num_threads())
        with ThreadPoolExecutor(copiers) as pool:
            list(pool.map(_copy, (pairs[first::copiers] for first in range(copiers))))
        if any(local.is_cuda for _, local in pairs):
            torch.cuda.synchronize()
        return copied


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Not copy_ on CPU: where other programs compute too, the barriers of its OpenMP threads cost more than they gain (3 times
    the CPU time, and up to seconds of waiting)."""
    for buffer, local in pairs:
        if local.is_cuda or not local.is_contiguous():
            buffer.copy_(local, non_blocking=True)
        else:
            np.copyto(buffer.view(-1).view(torch.uint8).numpy(), local.view(-1).view(torch.uint8).numpy())
