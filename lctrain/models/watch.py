"""Watch: what a model notes of its own training steps, for metrics: loss by position, and the time of its forward passes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from lctrain.parallel.group import Waits
from lctrain.parallel.layout import IGNORE


def position_bucket(positions: Tensor) -> Tensor:
    """Bucket of every target, int64: 0 for one predicted from 1 token of its document, k from 2^(k-1) + 1 to 2^k tokens.

    positions: int64, of the token that predicts within its document, from 0 on.
    """
    return torch.frexp(positions.double()).exponent.long()  # bits of an integer


class Watch:
    """Sums since `forget`; only passes that train count.

    longest: tokens of the longest sample. waits: of all groups of ranks that a forward pass may wait for.
    sums: fp64 [2, buckets], losses and targets by position.
    """

    def __init__(self, longest: int, waits: Collection[Waits], device: torch.device) -> None:
        self._waits = waits
        self.sums = torch.zeros(2, (longest - 1).bit_length() + 1, dtype=torch.float64, device=device)
        self._forward_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around this rank's sublayers."""
        if self.sums.is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        began, waited = time.perf_counter(), self._waited()
        yield
        self._forward_s += time.perf_counter() - began - (self._waited() - waited)

    def losses(self, per_token: Tensor, labels: Tensor, positions: Tensor) -> None:
        """Add a micro-batch; all [B, T], losses 0 where there is no target."""
        bucket = position_bucket(positions.flatten()).clamp_(max=self.sums.shape[1] - 1)
        self.sums[0].index_add_(0, bucket, per_token.detach().flatten().double())
        self.sums[1].index_add_(0, bucket, (labels.flatten() != IGNORE).double())

    def forward_s(self) -> float:
        """Seconds in this rank's sublayers; on CPU without waiting for others, on CUDA with it."""
        for begin, end in self._events:
            end.synchronize()
            self._forward_s += begin.elapsed_time(end) / 1000
        self._events.clear()
        return self._forward_s

    def forget(self) -> None:
        """Begin anew."""
        self.sums.zero_()
        self._events.clear()
        self._forward_s = 0.0

    def _waited(self) -> float:
        return sum(waits.seconds for waits in self._waits)
