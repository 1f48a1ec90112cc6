"""What data parallelism sends in a step, by engine, and what hides it.

As the engines do it here: torch's DDP and megatron-core's reduce gradients in buckets while the last micro-batch's backward
pass goes on; FSDP2 and ZeRO-3 gather weights ahead of their use and reduce gradients behind it, in every micro-batch; ZeRO 0
to 2 reduce without hiding it, unless DeepSpeed's overlap_comm says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from lctrain.config.deepspeed import checked_config, zero_stage
from lctrain.config.schema import TrainConfig
from lctrain.parallel.mesh import ProcessMesh
from lctrain.plan.cost import FP32, Sent
from lctrain.plan.layers import Parameters

When = Literal["forward", "backward", "last backward", "after"]
DDP_BUCKET = 25 << 20
"""Bytes of a bucket of torch's DDP."""
MEGATRON_BUCKET = 40_000_000
"""Least elements of a bucket of megatron-core's (1e6 a rank if that is more)."""


class Replicated(NamedTuple):
    """Bytes sent, when in a step (forward, backward: of every micro-batch), and whether computing goes on beside it."""

    sent: Sent
    when: When
    hidden: bool


def replicated(config: TrainConfig, mesh: ProcessMesh, held: Parameters, parts: int) -> tuple[Replicated, ...]:
    """What a rank of a stage sends. parts: sublayers of the stage."""
    ways = {"torch": _torch, "megatron": _megatron, "deepspeed": _deepspeed}
    return tuple(item for item in ways[config.engine.name](config, mesh, held, parts) if item.sent.bytes)


def _torch(config: TrainConfig, mesh: ProcessMesh, held: Parameters, parts: int) -> Iterator[Replicated]:
    apart = held.expert if mesh.ep > 1 else 0
    dense = held.dense + held.expert - apart
    if config.engine.data_parallel == "fsdp":
        for dimension, ranks, count in (("dp_cp", mesh.dp * mesh.cp, dense), ("edp", mesh.edp, apart)):
            again = count - (held.root if dimension == "dp_cp" else 0)
            yield Replicated(_gathered(dimension, ranks, FP32 * count, parts + 1), "forward", True)
            yield Replicated(_gathered(dimension, ranks, FP32 * again, parts), "backward", True)
            yield Replicated(_scattered(dimension, ranks, FP32 * count, parts + 1), "backward", True)
        return
    buckets = -(-FP32 * dense // DDP_BUCKET)
    yield Replicated(_reduced("dp_cp", mesh.dp * mesh.cp, FP32 * dense, buckets), "last backward", True)
    yield Replicated(_reduced("edp", mesh.edp, FP32 * apart, 1), "after", False)


def _megatron(config: TrainConfig, mesh: ProcessMesh, held: Parameters, parts: int) -> Iterator[Replicated]:
    width = 2 if config.engine.dtype == "bf16" else FP32
    for dimension, ranks, count in (("dp_cp", mesh.dp * mesh.cp, held.dense), ("edp", mesh.edp, held.expert)):
        buckets = -(-count // max(MEGATRON_BUCKET, 1_000_000 * ranks))
        if not config.engine.distributed_optimizer:
            yield Replicated(_reduced(dimension, ranks, FP32 * count, buckets), "last backward", True)
            continue
        yield Replicated(_scattered(dimension, ranks, FP32 * count, buckets), "last backward", True)
        yield Replicated(_gathered(dimension, ranks, width * count, buckets), "after", False)


def _deepspeed(config: TrainConfig, mesh: ProcessMesh, held: Parameters, parts: int) -> Iterator[Replicated]:
    stage, zero = zero_stage(config), checked_config(config).get("zero_optimization", {})
    overlap = zero.get("overlap_comm")
    overlap = stage == 3 if overlap is None else bool(overlap) and mesh.pp == 1
    bucket = int(zero.get("reduce_bucket_size", 500_000_000))
    for dimension, ranks, count in (("dp_cp", mesh.dp * mesh.cp, held.dense), ("edp", mesh.edp, held.expert)):
        buckets = -(-count // bucket)
        if stage == 0:
            yield Replicated(_reduced(dimension, ranks, FP32 * count, buckets), "after", False)
        elif stage < 3:
            when: When = "last backward" if stage == 1 else "backward"
            yield Replicated(_reduced(dimension, ranks, FP32 * count, buckets), when, overlap)
            yield Replicated(_gathered(dimension, ranks, FP32 * count, buckets), "after", False)
        else:
            yield Replicated(_gathered(dimension, ranks, FP32 * count, parts + 1), "forward", overlap)
            yield Replicated(_gathered(dimension, ranks, FP32 * count, parts + 1), "backward", overlap)
            yield Replicated(_scattered(dimension, ranks, FP32 * count, buckets), "backward", overlap)


def _gathered(dimension: str, ranks: int, size: int, calls: int) -> Sent:
    return Sent(dimension, "all_gather", size * (ranks - 1) // ranks, calls)


def _scattered(dimension: str, ranks: int, size: int, calls: int) -> Sent:
    return Sent(dimension, "reduce_scatter", size * (ranks - 1) // ranks, calls)


def _reduced(dimension: str, ranks: int, size: int, calls: int) -> Sent:
    return Sent(dimension, "all_reduce", 2 * size * (ranks - 1) // ranks, calls)
