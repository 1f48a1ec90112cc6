"""The attention that all contenders of `lctrain bench attention` compute, and how a pass over it is measured."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lctrain.bench.documents import document_borders
from lctrain.bench.memory import forget_peak, peak_resident_mib, resident_mib
from lctrain.config.bench import AttentionBenchConfig
from lctrain.devices import DTYPES
from lctrain.parallel.deal import make_layout
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.schedule import Direction

T = TypeVar("T")


class Timing(NamedTuple):
    """Wall and CPU seconds (all threads) of one direction."""

    wall: float
    cpu: float


class Gradients(NamedTuple):
    """Results of a forward and backward pass, each [B, tokens, heads, D]; None of gradients that nobody can compute."""

    out: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward and backward pass of one process.

    backward: None if there is none.
    memory_mib: peak above what was resident with the inputs at hand.
    sent: bytes given to the process group, by direction and kind.
    results: out and gradients, if they were asked for.
    """

    forward: Timing
    backward: Timing | None
    memory_mib: float
    sent: dict[Direction, Counter[str]]
    results: Gradients | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Causal attention over `seq` tokens; inputs are a pure function of the fields."""

    shape: AttentionShape
    seq: int
    borders: tuple[int, ...]
    window: int | None
    layout_kind: str
    seed: int

    @classmethod
    def of(cls, config: AttentionBenchConfig, seq: int) -> Problem:
        """The problem of one sequence length."""
        kv_heads = config.kv_heads or config.heads
        shape = AttentionShape(config.batch, config.heads, kv_heads, config.head_dim, DTYPES[config.dtype])
        return cls(shape, seq, document_borders(config, seq), config.window, config.layout, config.seed)

    @property
    def mask(self) -> AttentionMask:
        """Who sees whom, the same in every row."""
        return AttentionMask((self.borders,), causal=True, window=self.window)

    def layout(self, world_size: int) -> SequenceLayout:
        """Who owns which tokens."""
        return make_layout(self.layout_kind, world_size, self.seq, (self.borders,), self.window)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of out, normal with variance 1, in the problem's dtype."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.shape.n_heads, self.shape.n_kv_heads, self.shape.n_kv_heads, self.shape.n_heads)
        sizes = [(self.shape.batch, self.seq, n, self.shape.head_dim) for n in heads]
        q, k, v, dout = (torch.randn(size, generator=generator).to(self.shape.dtype) for size in sizes)
        return q, k, v, dout


def measure(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    want_results: bool,
    meet: Callable[[], object] = lambda: None,
    sent: Counter[str] | None = None,
    has_backward: bool = True,
) -> Pass:
    """One pass of `attend` over q, k, v and the gradient of out, each direction from one meeting of all ranks to the next.

    sent: a running count of bytes.
    """
    counts = Counter[str]() if sent is None else sent
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    forget_peak()
    before = resident_mib()
    out, forward = timed(lambda: attend(q, k, v), meet)
    sent_forward = Counter(counts)
    backward = timed(lambda: out.backward(inputs[3]), meet)[1] if has_backward else None
    memory = peak_resident_mib() - before
    results = Gradients(out.detach(), q.grad, k.grad, v.grad) if want_results else None
    return Pass(forward, backward, memory, {"forward": sent_forward, "backward": counts - sent_forward}, results)


def timed(action: Callable[[], T], meet: Callable[[], object]) -> tuple[T, Timing]:
    """What an action returns, and what it takes from one meeting of all ranks to the next."""
    meet()
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    meet()
    return result, Timing(time.perf_counter() - wall, time.process_time() - cpu)
