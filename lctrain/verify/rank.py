"""What each rank does: its share of some cases, and how far it is from what one process gets."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.deal import make_layout
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.verify.exact import Results
from lctrain.verify.matrix import Case
from lctrain.verify.problem import Inputs

STRAY = 3.0
"""What the layout's padding is filled with, so that it shows if anything attends to it."""


class Share(NamedTuple):
    """One rank's part of a case.

    errors: per tensor of Results but dsinks, the largest error and the sum of squared errors.
    dsinks: this rank's part of it; ranks add theirs up.
    sent: bytes handed over by direction and kind.
    flaws: what is wrong whatever the precision.
    """

    errors: dict[str, tuple[float, float]]
    dsinks: Tensor | None
    sent: dict[str, Counter[str]]
    flaws: tuple[str, ...]


def layout_of(case: Case, mask: AttentionMask) -> SequenceLayout:
    """The layout of a case; `balanced` follows the documents."""
    return make_layout(case.layout, case.cp, case.problem.length, mask.documents, mask.window)


def run_cases(rank: int, world_size: int, cases: list[Case], wanted: Results) -> list[Share]:
    """The shares of cases that have one problem in common, whose results are `wanted`. Collective over the default group."""
    group = RankGroup(dist.group.WORLD if world_size > 1 else None)
    inputs, mask = cases[0].problem.inputs(), cases[0].problem.attention_mask()
    return [_run(case, rank, group, inputs, mask, wanted) for case in cases]


def _run(case: Case, rank: int, group: RankGroup, inputs: Inputs, mask: AttentionMask, wanted: Results) -> Share:
    layout = layout_of(case, mask)
    q, k, v, dout = (layout.shard(x, rank, dim=1, pad=STRAY) for x in inputs[:4])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sinks = None if inputs.sinks is None else inputs.sinks.clone().requires_grad_()
    group.sent.clear()
    out, lse = sequence_parallel_attention(*leaves, layout=layout, mask=mask, group=group, strategy=case.strategy, sinks=sinks)
    assert lse is not None
    forward = Counter(group.sent)
    out.backward(dout)
    sent = {"forward": forward, "backward": group.sent - forward}
    found = {"out": out.detach(), "lse": lse}
    for name, leaf in zip(("dq", "dk", "dv"), leaves, strict=True):
        assert leaf.grad is not None
        found[name] = leaf.grad
    dsinks = None if sinks is None else sinks.grad if sinks.grad is not None else torch.zeros_like(sinks)
    own = _owned(mask, layout, rank, len(q))
    errors, flaws = {}, []
    for name, tensor in found.items():
        dim = 2 if name == "lse" else 1
        real = own[:, None, :] if name == "lse" else own[:, :, None, None]
        if tensor.isnan().any():
            flaws.append(f"NaN in {name}")
        if name != "lse" and tensor.masked_select(~real).any():
            flaws.append(f"{name} of padding is not 0")
        error = tensor.double() - layout.shard(getattr(wanted, name), rank, dim)
        error = error.masked_select(real.expand_as(error))
        errors[name] = float(error.abs().max()) if len(error) else 0.0, float(error.square().sum())
    return Share(errors, dsinks, sent, tuple(flaws))


def _owned(mask: AttentionMask, layout: SequenceLayout, rank: int, batch: int) -> Tensor:
    """Which of this rank's tokens belong to a document: bool [batch, layout.local_length]."""
    ends = torch.tensor([borders[-1] for borders in mask.documents])
    return (layout.indices(rank) < ends[:, None]).expand(batch, -1)
