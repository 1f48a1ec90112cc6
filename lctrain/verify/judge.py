"""How wrong a result may be.

Errors are against fp64 on the same inputs:
  fp32  out, dq, dk, dv, dsinks: largest error over the largest entry; lse: largest error over the largest of the lse and 1,
        because an lse is a logarithm and an absolute error of it is a relative one of the softmax.
  bf16  root of the mean squared error over that of the entries; lse as above. Compared with the same error of torch's
        scaled_dot_product_attention in one process on the same data.
Where the exact result is 0 everywhere (dq of documents of one token), errors are absolute.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain.parallel.cost import traffic
from lctrain.verify.exact import Results
from lctrain.verify.matrix import Case
from lctrain.verify.rank import Share, layout_of

FP32_BAR = 2e-6
BF16_BAR = 1.1
"""Error over one process's own, over all cases of a strategy and world size together."""
BF16_CASE_BAR = 2.0
"""The same for one case, where few numbers make the ratio noisy; errors below BF16_ROUNDING always pass."""
BF16_ROUNDING = {"out": 2.0**-8, "dq": 2.0**-8, "dk": 2.0**-8, "dv": 2.0**-8, "lse": 2.0**-8, "dsinks": 2.0**-6}
"""dsinks has one number per head, a sum over all tokens of terms of both signs, formed from an out that is rounded to bf16."""
POOLED_CASES = 30
"""Fewer bf16 cases than this are not judged together."""
TENSORS = tuple(BF16_ROUNDING)
POOLED = TENSORS[:-1]
"""Tensors that are judged together: all but the few numbers of dsinks, which make no steady ratio."""


class Verdict(NamedTuple):
    """A case's errors by tensor; in bf16 also those of one process; and what is wrong with it, if anything."""

    case: Case
    errors: dict[str, float]
    own: dict[str, float] | None
    failures: tuple[str, ...]


def judge(case: Case, shares: Sequence[Share], wanted: Results, own: dict[str, float] | None) -> Verdict:
    """The verdict on a case from all ranks' shares; own: one process's errors, for bf16."""
    failures = sorted({flaw for share in shares for flaw in share.flaws})
    errors = {}
    for name in TENSORS[:-1]:
        parts = [share.errors[name] for share in shares]
        top, squares = worst([part[0] for part in parts]), sum(part[1] for part in parts)
        errors[name] = relative(name, getattr(wanted, name), top, squares, rms=own is not None)
    if wanted.dsinks is not None:
        dsinks = torch.stack([share.dsinks.double() for share in shares if share.dsinks is not None]).sum(0)
        errors["dsinks"] = error_of("dsinks", dsinks, wanted.dsinks, rms=own is not None)
    for name, error in errors.items():
        bar = FP32_BAR if own is None else max(BF16_CASE_BAR * own[name], BF16_ROUNDING[name])
        if not error <= bar:
            failures.append(f"{name} is off by {error:.1e}, allowed are {bar:.1e}")
    return Verdict(case, errors, own, (*failures, *wrong_bytes(case, shares)))


def worst(errors: Sequence[float]) -> float:
    """The largest, where nothing is worse than NaN (which max() would overlook)."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def error_of(name: str, found: Tensor, wanted: Tensor, rms: bool) -> float:
    """`relative` of a whole tensor; entries that are infinite in `wanted` (lse of padding) do not count."""
    real = torch.isfinite(found) & torch.isfinite(wanted)
    error = (found.double() - wanted)[real]
    return relative(name, wanted, float(error.abs().max()) if len(error) else 0.0, float(error.square().sum()), rms)


def relative(name: str, wanted: Tensor, largest: float, squares: float, rms: bool) -> float:
    """The error as this module's docstring defines it."""
    finite = wanted[torch.isfinite(wanted)]
    top = float(finite.abs().max()) if len(finite) else 0.0
    if name == "lse":
        return largest / max(1.0, top)
    if top < 1e-12:
        return largest
    return math.sqrt(squares / float(finite.square().sum())) if rms else largest / top


def wrong_bytes(case: Case, shares: Sequence[Share]) -> list[str]:
    """Where bytes handed to the process group differ from those of the schedule (which knows no lse: training sends none)."""
    mask = case.problem.attention_mask()
    layout = layout_of(case, mask)
    wrong = []
    for direction in ("forward", "backward"):
        for rank, share in enumerate(shares):
            planned = traffic(case.strategy, layout, mask, case.problem.shape, direction, rank)
            sent = Counter({kind: count for kind, count in share.sent[direction].items() if kind != "lse"})
            if sent != planned:
                wrong.append(f"rank {rank} sent {dict(sent)} in {direction}, planned are {dict(planned)}")
    return wrong


def pooled_ratio(verdicts: Sequence[Verdict], name: str) -> float | None:
    """Error over one process's own in the mean square of the bf16 cases; None if these are too few to tell."""
    both = [(v.errors[name], v.own[name]) for v in verdicts if v.own is not None and name in v.errors]
    if len(both) < POOLED_CASES:
        return None
    own = math.fsum(b * b for _, b in both)
    return math.sqrt(math.fsum(a * a for a, _ in both) / own) if own else None


def pooled_failures(ratios: Mapping[str, float | None]) -> list[str]:
    """Tensors whose pooled bf16 error is above the bar."""
    return [
        f"{name}: bf16 error is {ratio:.2f} times one process's own over all cases, allowed are {BF16_BAR}"
        for name, ratio in ratios.items()
        if ratio is not None and ratio > BF16_BAR
    ]
