"""Measuring this machine for the simulator: the attention kernel on one core, what a call, a pass and a tensor take however
small they are, gloo between two processes, and how much of the cores other programs leave us.

Kernel and transfers are measured in CPU time, which other programs change little; the simulator then shares out the cores.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from statistics import fmean, median
from typing import NamedTuple

import torch
import torch.distributed as dist

from lctrain.kernels.attention import fused
from lctrain.kernels.attention.band import Band
from lctrain.kernels.attention.merge import merge_
from lctrain.launch.ranks import RankPool
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.cost import PRODUCTS, costed_steps
from lctrain.parallel.device import Device, Rates
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.simulator import exchanges
from lctrain.parallel.strategy import Strategy
from lctrain.parallel.topology import Duplex, Link, Topology

SIZES = (128, 512, 2048, 4096)
"""Rows and columns of measured rectangles, and sides of measured causal squares."""
HEADS = 2
REPEATS = 5
MESSAGE = 32 << 20
"""Bytes of a message whose bandwidth is measured."""
FEW, MANY = 2, 18
"""Documents of one token whose attention tells what a call takes, and what the rest."""
PADDING = 2048
"""Tokens of padding behind them that tell what a pass takes for what is not computed."""
PASSES = 8
"""Passes in a row over them."""
HALF_DUPLEX = 0.75
"""Below this ratio of two-way to one-way bandwidth (of each direction) a link counts as half duplex."""


class Network(NamedTuple):
    """gloo between processes. bytes/s one way, and of each direction both ways; seconds; core-seconds of an end for a byte, for
    a tensor, and for all that it posts together."""

    one_way: float
    two_way: float
    latency: float
    cpu_s_per_byte: float
    cpu_s_per_message: float = 0.0
    cpu_s_per_exchange: float = 0.0

    @property
    def duplex(self) -> Duplex:
        """Whether both ways at once get less each than one alone."""
        return "half" if self.two_way < HALF_DUPLEX * self.one_way else "full"


def core_fraction(pool: RankPool, seconds: float = 0.15) -> float:
    """Share of the cores it could use that `pool` gets when all of its ranks compute."""
    return min(1.0, sum(pool.run(_spin, seconds)) / min(pool.world_size, len(os.sched_getaffinity(0))))


def topology(network: Network, cores: float) -> Topology:
    """This machine as one node for any number of ranks."""
    link = Link(network.one_way, network.latency, network.duplex)
    fixed = network.cpu_s_per_message, network.cpu_s_per_exchange
    return Topology(1 << 30, link, link, 1, network.cpu_s_per_byte, cores, *fixed)


def measure_device(pool: RankPool, shape: AttentionShape) -> Device:
    """The kernel for heads of the shape's size and dtype, one thread on each rank of `pool`, all at once."""
    causal = [(size, size, True) for size in SIZES]
    full = [(rows, columns, False) for rows in SIZES for columns in SIZES]
    ranks = pool.run(_kernel_seconds, shape, [(1, 1, False), *causal, *full], timeout_s=600.0)
    smallest, *best = [tuple(map(fmean, zip(*times, strict=True))) for times in zip(*ranks, strict=True)]
    tables = []
    for way, direction in enumerate(("forward", "backward")):
        for calls, times, width in ((full, best[len(causal) :], len(SIZES)), (causal, best, 1)):
            rates = [
                2
                * PRODUCTS[direction]
                * shape.head_dim
                * HEADS
                * _band(*call).entries
                / max(1e-9, seconds[way] - smallest[way])
                for call, seconds in zip(calls, times, strict=False)
            ]
            lines = tuple(tuple(rates[at : at + width]) for at in range(0, len(rates), width))
            tables.append(Rates(SIZES, SIZES if width > 1 else (1,), lines))
    forward, causal_forward, backward, causal_backward = tables
    few, many, padded = (
        fmean(pool.run(_documents_seconds, shape, *case)) / 2 for case in ((FEW, FEW), (MANY, MANY), (FEW, PADDING))
    )
    call = max(0.0, (many - few) / (MANY - FEW))
    queries = (PADDING - FEW) * shape.batch * shape.n_heads * shape.head_dim * shape.dtype.itemsize
    fixed = call, max(0.0, few - FEW * call), max(0.0, padded - few) / queries
    return Device(forward, backward, causal_forward, causal_backward, *fixed)


def with_exchanges(network: Network, pool: RankPool, shape: AttentionShape, device: Device) -> Network:
    """With what tensors and exchanges take however small they are, among the ranks of `pool`.

    An exchange: what a ring over one token per chunk takes beyond its calls, passes and tensors, such as threads that wake up.
    """
    if pool.world_size == 1:
        return network
    one, many = (fmean(pool.run(_exchange_seconds, count)) for count in (1, MANY))
    message = max(0.0, many - one) / (MANY - 1) / 2
    tokens = 2 * pool.world_size
    problem = Strategy("ring"), SequenceLayout("zigzag", pool.world_size, tokens), AttentionMask.dense(tokens)
    ways = [costed_steps(*problem, shape, way) for way in ("forward", "backward")]
    steps = [step for ranks in ways for own in ranks for step in own]
    calls, ends = sum(len(step.calls) for step in steps), 2 * sum(send.tensors for step in steps for send in step.sends)
    known = calls * device.call_s + 2 * pool.world_size * device.pass_s + ends * message  # the queries' bytes are few
    rest = sum(pool.run(_pass_seconds, shape, *problem)) - known
    exchange = max(0.0, rest) / sum(len(exchanges(ranks)) for ranks in ways)
    return network._replace(cpu_s_per_message=message, cpu_s_per_exchange=exchange)


def measure_network(pool: RankPool) -> Network:
    """gloo between the two ranks of a pool: the best bandwidth and latency of several, the median CPU time."""
    sender, receiver = pool.run(_transfers, timeout_s=300.0)
    seconds = {name: max(sender[name], receiver[name]) for name in ("one_way", "two_way", "latency")}
    cpu = (sender["cpu"] + receiver["cpu"]) / 2
    return Network(MESSAGE / seconds["one_way"], MESSAGE / seconds["two_way"], seconds["latency"], cpu / MESSAGE)


def _spin(rank: int, world_size: int, seconds: float) -> float:
    """Cores that this rank gets: CPU time over wall time of a computation."""
    x = torch.ones(128, 128)
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        x = (x @ x).clamp_(max=1.0)
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


def _band(rows: int, columns: int, causal: bool) -> Band:
    return Band(0, rows, 0, columns, None, 0 if causal else None)


def _kernel_seconds(
    rank: int, world_size: int, shape: AttentionShape, calls: list[tuple[int, int, bool]]
) -> list[tuple[float, float]]:
    """CPU seconds of every call in both directions."""
    dist.barrier()
    return [_call_seconds(shape, *call) for call in calls]


def _documents_seconds(rank: int, world_size: int, shape: AttentionShape, count: int, length: int) -> float:
    """CPU seconds of forward and backward over documents of one token each and padding; other ranks have no part in it."""
    dist.barrier()
    mask = AttentionMask((tuple(range(count + 1)),), causal=True, window=None)
    return _passes(shape, SequenceLayout("contiguous", 1, length), mask, RankGroup(), Strategy())


def _exchange_seconds(rank: int, world_size: int, count: int) -> float:
    """Seconds of this thread for `count` tensors to the next rank and as many from the one before."""
    group, tensors = RankGroup(dist.group.WORLD), [torch.zeros(1) for _ in range(count)]
    sends = [("x", tensor, (rank + 1) % world_size) for tensor in tensors]
    dist.barrier()
    times = []
    for _ in range(PASSES * REPEATS):
        began = time.thread_time()
        group.wait(group.exchange(sends, [(torch.empty(1), (rank - 1) % world_size) for _ in tensors]))
        times.append(time.thread_time() - began)
    return median(times)


def _pass_seconds(
    rank: int, world_size: int, shape: AttentionShape, strategy: Strategy, layout: SequenceLayout, mask: AttentionMask
) -> float:
    """CPU seconds that this rank spends on forward and backward."""
    dist.barrier()
    return _passes(shape, layout, mask, RankGroup(dist.group.WORLD), strategy)


def _passes(shape: AttentionShape, layout: SequenceLayout, mask: AttentionMask, group: RankGroup, strategy: Strategy) -> float:
    """CPU seconds of a pass. Of several in a row, as the kernel counts the time of sleeping threads in coarse steps."""
    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads, shape.n_heads)
    *inputs, dout = (torch.randn(shape.batch, layout.local_length, n, shape.head_dim).to(shape.dtype) for n in heads)
    q, k, v = (x.requires_grad_() for x in inputs)

    def one() -> None:
        out, _ = sequence_parallel_attention(q, k, v, layout=layout, mask=mask, group=group, strategy=strategy, need_lse=False)
        out.backward(dout)

    def some() -> None:
        for _ in range(PASSES):
            one()

    return _cpu(some) / PASSES


def _call_seconds(shape: AttentionShape, rows: int, columns: int, causal: bool) -> tuple[float, float]:
    """As the executor does it: in its portions of heads, with what it does to add the results up."""
    scale, band = 1 / math.sqrt(shape.head_dim), _band(rows, columns, causal)
    q, dout = (torch.randn(1, rows, HEADS, shape.head_dim).to(shape.dtype) for _ in range(2))
    k, v = (torch.randn(1, columns, HEADS, shape.head_dim).to(shape.dtype) for _ in range(2))
    total = torch.zeros_like(q, dtype=fused.accumulation_dtype(shape.dtype))
    total_lse = total.new_full((1, HEADS, rows), float("-inf"))
    into = [torch.zeros_like(x, dtype=total.dtype) for x in (q, k, v)]

    portions = fused.portions(q, k, band)

    def forward() -> None:
        for own, their in portions:
            out, lse, _ = fused.forward(q[:, :, own], k[:, :, their], v[:, :, their], band, scale, partial=True)
            merge_(total[:, :, own], total_lse[:, own], out, lse)

    out, lse, _ = fused.forward(q, k, v, band, scale)
    out = out.to(q.dtype)

    def backward() -> None:
        for own, their in portions:
            inputs = dout[:, :, own], q[:, :, own], k[:, :, their], v[:, :, their], out[:, :, own], lse[:, own]
            fused.backward_(*inputs, band, scale, (into[0][:, :, own], into[1][:, :, their], into[2][:, :, their]))

    return _cpu(forward), _cpu(backward)


def _cpu(action: Callable[[], object]) -> float:
    """Median CPU seconds of a few runs, after one that warms up."""
    action()
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return median(times)


def _transfers(rank: int, world_size: int) -> dict[str, float]:
    """Seconds of a big message one way and both ways, and of a small one; CPU seconds that an end spends on a big one.

    The CPU time is that of a whole transfer as the courier makes it: packed by one end, received into fresh memory and added to
    something by the other.
    """
    big, arriving, total, small = (torch.zeros(count) for count in (*[MESSAGE // 4] * 3, 1))
    times: dict[str, list[float]] = {"one_way": [], "two_way": [], "latency": [], "cpu": []}
    for _ in range(2 * REPEATS):
        times["one_way"].append(_seconds(lambda: _exchange(None, arriving, 0) if rank else _exchange(big, None, 1)))
        times["two_way"].append(_seconds(lambda: _exchange(big, arriving, 1 - rank)))
        times["latency"].append(_seconds(lambda: _exchange(small, torch.empty(1), 1 - rank)))
        cpu = time.process_time()
        if rank == 0:
            _exchange(big.clone(), None, 1)
        else:
            fresh = torch.empty_like(big)
            _exchange(None, fresh, 0)
            total += fresh
        times["cpu"].append(time.process_time() - cpu)
    return {name: median(values) if name == "cpu" else min(values) for name, values in times.items()}


def _seconds(action: Callable[[], object]) -> float:
    """Wall seconds from one meeting of the ranks to the next, of an action."""
    dist.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _exchange(sent: torch.Tensor | None, arriving: torch.Tensor | None, peer: int) -> None:
    operations = [] if sent is None else [dist.P2POp(dist.isend, sent, peer)]
    if arriving is not None:
        operations.append(dist.P2POp(dist.irecv, arriving, peer))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
