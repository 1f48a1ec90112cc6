"""Verdict on a layout: each finding beside that of one process, and the limit that it must keep."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lctrain.engines.base import StepResult
from lctrain.models.place import Place
from lctrain.verify.layout.rank import Findings
from lctrain.verify.layout.samples import MadeSamples

LOSS, GRADIENT, NORM, WEIGHT, LEAK = 1e-6, 1e-5, 1e-6, 1e-5, 1e-6
"""Largest deviation from one process: of losses (nats), of each gradient and weight (relative, fp32), of the gradient norm
(relative), and of another document's losses when one document changes (nats)."""


class Check(NamedTuple):
    """One line of the report: what, how far off, the limit, and where the largest deviation is."""

    name: str
    value: float
    limit: float
    where: str = ""

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.value <= self.limit


def judge(
    found: Findings,
    reference: Findings,
    loaded: tuple[dict[str, Any], StepResult],
    wanted: tuple[dict[str, Any], StepResult],
    places: dict[str, Place],
    changed: tuple[int, int],
    samples: MadeSamples,
) -> list[Check]:
    """Every check of a layout.

    loaded, wanted: what one process reads from the layout's checkpoint and from its own (see load_checkpoint).
    """
    first, last = reference.steps[0], reference.steps[-1]
    scale = max(1.0, abs(first.loss))
    checks = [
        Check("loss", abs(found.steps[0].loss - first.loss) / scale, LOSS),
        _worst("token losses", {str(i): (found.losses[i], reference.losses[i]) for i in reference.losses}, 10 * LOSS, False),
        Check("grad norm", abs(found.steps[0].grad_norm / first.grad_norm - 1), NORM),
    ]
    checks += _gradients(found.gradients, reference.gradients, places)
    checks.append(leak(found, changed, samples, LEAK))
    later = max(abs(a.loss - b.loss) for a, b in zip(found.steps, reference.steps, strict=True)) / scale
    checks.append(Check("losses of all steps", later, 10 * LOSS))
    weights, theirs = loaded[0], wanted[0]
    if weights.keys() != theirs.keys():
        checks.append(Check("names in checkpoint", math.inf, 0, ", ".join(sorted(weights.keys() ^ theirs.keys())[:3])))
    else:
        pairs = {name: (weights[name], theirs[name]) for name in theirs}
        checks.append(_worst("weights after steps", {n: p for n, p in pairs.items() if n.startswith("weight")}, WEIGHT))
        checks.append(_worst("optimizer state", {n: p for n, p in pairs.items() if not n.startswith("weight")}, 10 * WEIGHT))
    again = found.steps[-1]
    checks.append(
        Check("resumed here", max(abs(found.repeated.loss - again.loss), abs(found.repeated.grad_norm - again.grad_norm)), 0)
    )
    checks.append(Check("resumed by one process", abs(loaded[1].loss - last.loss) / scale, 10 * LOSS))
    return checks


def leak(found: Findings, changed: tuple[int, int], samples: MadeSamples, limit: float) -> Check:
    """Another document's losses must not move when one changes, and its own must."""
    sample, document = changed
    borders = samples.borders(sample)
    worst, where = 0.0, ""
    for index, before in found.losses.items():
        moved = (found.changed[index] - before).abs()
        if index == sample:
            own = moved[borders[document] : borders[document + 1]]
            if float(own.max()) < 1e-3:
                return Check("leak probe", math.inf, limit, "the changed document's own losses stayed as they were")
            own.zero_()
        if not float(moved.max()) <= worst:
            worst, where = float(moved.max()), f"sample {index}, token {int(moved.argmax())}"
    return Check("leak probe", worst, limit, where)


def _gradients(found: dict[str, Tensor], reference: dict[str, Tensor], places: dict[str, Place]) -> list[Check]:
    missing = reference.keys() ^ found.keys()
    if missing:
        return [Check("gradients", math.inf, GRADIENT, f"only on one side: {', '.join(sorted(missing)[:3])}")]
    families = sorted({places[name].family for name in reference})
    checks = []
    for family in families:
        pairs = {name: (found[name], reference[name]) for name in reference if places[name].family == family}
        checks.append(_worst(f"gradients ({family})", pairs, GRADIENT))
    return checks


def _worst(name: str, pairs: dict[str, tuple[Tensor, Tensor]], limit: float, relative: bool = True) -> Check:
    """The largest deviation over tensors: by norm relative to the wanted one, or by entry."""
    worst, where = 0.0, ""
    for key, (found, wanted) in pairs.items():
        found, wanted = found.double(), wanted.double()
        if found.shape != wanted.shape:
            return Check(name, math.inf, limit, f"{key}: {list(found.shape)} is not {list(wanted.shape)}")
        if relative:
            error = float((found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny))
        else:
            error = float((found - wanted).abs().max())
        if not error <= worst:
            worst, where = error, key
    return Check(name, worst, limit, where)
