"""Copies of a state in host memory, made while the run computes with the state.

Between two updates nothing writes to weights, moments or counters, so the copy of a saved state need not be waited for at once:
it runs beside the next forward and backward passes, and only what changes the state waits for its end, as in DataStates-LLM
(Maurya et al. 2024, arXiv 2406.10707).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.distributed.tensor import DTensor

COPIERS = 4
"""Threads that copy between CPU tensors, at most: a few saturate the memory."""


class HostBuffers:
    """Host memory for one state, made by the first copy and kept for the next; pinned where tensors come from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def like(self, name: str, local: torch.Tensor) -> torch.Tensor:
        """The buffer of a tensor."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            pin = local.is_cuda and local.numel() > 0
            buffer = self._buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=pin)
        return buffer


class HostCopy:
    """One copy of tensors as they are when this is made, on the thread and the stream that will change them.

    `run` copies, in another thread; `wait`, in the first one, must come before any of the tensors changes.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], buffers: HostBuffers) -> None:
        self._tensors, self._buffers = tensors, buffers
        self._begun = threading.Event()  # CPU tensors are copied, and the copies of CUDA tensors are in their stream
        self._device = next((_local(tensor).device for tensor in tensors.values() if tensor.is_cuda), None)
        self._ready: torch.cuda.Event | None = None
        self._done: torch.cuda.Event | None = None
        if self._device is not None:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def run(self) -> dict[str, torch.Tensor]:
        """The same tensors in host memory that the run does not touch, valid until the buffers are used again."""
        try:
            with self._stream():
                copied, pairs = {}, []
                for name, tensor in self._tensors.items():
                    local = _local(tensor)
                    buffer = self._buffers.like(name, local)
                    pairs.append((buffer, local))
                    # Not from_local: it would move the copy back to the mesh's device.
                    copied[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
                copy_all(pairs)
        finally:
            self._begun.set()
        if self._done is not None:
            # Until then `pairs` holds what the run may have dropped: the allocator would give it out again.
            self._done.synchronize()
        self._tensors = {}
        return copied

    def wait(self) -> None:
        """Return once what is computed from now on, on this thread's stream, may change the tensors."""
        self._begun.wait()
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """A stream beside the run's, which begins where that one stood; nothing for a state in host memory."""
        if self._device is None or self._ready is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            torch.cuda.current_stream().wait_event(self._ready)
            yield
            done = torch.cuda.Event()
            done.record()
            self._done = done


def copy_all(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Fill every buffer from its tensor; from CUDA only into the current stream, without waiting."""
    here = [pair for pair in pairs if not pair[1].is_cuda]
    copiers = min(COPIERS, torch.get_num_threads())
    with ThreadPoolExecutor(copiers) as pool:
        list(pool.map(_copy_here, (here[first::copiers] for first in range(copiers))))
    for buffer, local in pairs:
        if local.is_cuda:
            buffer.copy_(local, non_blocking=True)


def _copy_here(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Not copy_: where other programs compute too, the barriers of its OpenMP threads cost more than they gain (3 times the CPU
    time, and up to seconds of waiting)."""
    for buffer, local in pairs:
        if local.is_contiguous():
            np.copyto(buffer.view(-1).view(torch.uint8).numpy(), local.view(-1).view(torch.uint8).numpy())
        else:
            buffer.copy_(local)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
