"""Forward and backward passes of contenders that have a process each: how they are timed, compared and put into a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor

from lctrain.bench.child import Child
from lctrain.bench.memory import forget_peak, peak_resident_mib, resident_mib

SAME = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference of outputs and gradients at which two contenders still compute the same function, by dtype."""

COLUMNS = ("contender", "forward s", "backward s", "CPU s", "MiB", "/ ours", "/ ours, best CPU")
"""What `cells` gives, after the contender's name."""


class Pass(NamedTuple):
    """Wall seconds of both directions, CPU seconds of both together (all threads), and MiB above what was resident before."""

    forward_s: float
    backward_s: float
    cpu_s: float
    memory_mib: float


def timed_pass(forward: Callable[[], Tensor], dy: Tensor, leaves: Iterable[Tensor]) -> Pass:
    """One forward and backward pass; the leaves' gradients are new."""
    for leaf in leaves:
        leaf.grad = None
    forget_peak()
    before, cpu, start = resident_mib(), time.process_time(), time.perf_counter()
    y = forward()
    middle = time.perf_counter()
    y.backward(dy)
    end = time.perf_counter()
    return Pass(middle - start, end - middle, time.process_time() - cpu, peak_resident_mib() - before)


def take_turns(contenders: Mapping[str, Child], repeats: int, after_each: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Medians over `repeats` passes of every contender, which take turns; a first pass of each is not counted.

    after_each: called after every round.
    """
    passes: dict[str, list[Pass]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, child in contenders.items():
            passes[name].append(child.call("run"))
        after_each()
    return {name: _summary(timed) for name, (_, *timed) in passes.items()}


def _summary(timed: Sequence[Pass]) -> dict[str, float]:
    return {
        "forward_s": median(p.forward_s for p in timed),
        "backward_s": median(p.backward_s for p in timed),
        "cpu_s": median(p.cpu_s for p in timed),
        "best_cpu_s": min(p.cpu_s for p in timed),
        "memory_mib": max(p.memory_mib for p in timed),
    }


def both_s(found: Mapping[str, float]) -> float:
    """Median seconds of forward and backward together."""
    return found["forward_s"] + found["backward_s"]


def cells(name: str, found: Mapping[str, float], ours: Mapping[str, float]) -> tuple[str, ...]:
    """A contender's part of a row, under COLUMNS; `ours`: what its ratios are to."""
    return (
        name,
        f"{found['forward_s']:.3f}",
        f"{found['backward_s']:.3f}",
        f"{found['cpu_s']:.3f}",
        f"{found['memory_mib']:,.0f}",
        f"{both_s(found) / both_s(ours):.2f}",
        f"{found['best_cpu_s'] / ours['best_cpu_s']:.2f}",
    )


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, float]:
    """Largest difference over largest entry of numpy arrays, by name."""
    return {name: float(abs(one[name] - two[name]).max() / max(abs(two[name]).max(), 1e-30)) for name in two}


def differ(result: Mapping[str, Any], dtype: str) -> bool:
    """Whether a result's `errors` say that contenders do not compute the same function."""
    return any(error > SAME[dtype] for error in result.get("errors", {}).values())
