"""Naming what was not finite, and where."""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lctrain.data.batch import StepBatch
from lctrain.parallel.mesh import ProcessMesh


def describe_problem(mesh: ProcessMesh, batch: StepBatch, losses: list[Tensor], loss: float, grad_norm: float) -> str:
    """Name the ranks, samples and documents whose loss is not finite, or all if only the gradient is not, which is a sum.

    losses: of this rank's micro-batches. Collective: all ranks see the same problem.
    """
    mine = [
        (math.isfinite(float(value)), f"rank {mesh.rank}, sample {sample}, {_name(spans)}")
        for micro, value in zip(batch.micro_batches, losses, strict=True)
        for sample, spans in zip(micro.samples, micro.spans, strict=True)
    ]
    everyone: list[list[tuple[bool, str]]] = [mine]
    if mesh.size > 1:
        everyone = [[] for _ in range(mesh.size)]
        dist.all_gather_object(everyone, mine)
    all_finite = all(finite for places in everyone for finite, _ in places)
    places = [place for places in everyone for finite, place in places if all_finite or not finite]
    named = "; ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    what = f"loss {loss:g}, gradient norm {grad_norm:g}"
    if all_finite:
        return f"{what} over {named}: every loss is finite, the gradient overflowed"
    return f"{what}: first not finite on {named}"


def _name(spans: tuple[Any, ...]) -> str:
    shown = ", ".join(f"{span.document} of corpus {span.corpus}" for span in spans[:3])
    return f"document{'s' if len(spans) > 1 else ''} {shown}" + (f" and {len(spans) - 3} more" if len(spans) > 3 else "")
