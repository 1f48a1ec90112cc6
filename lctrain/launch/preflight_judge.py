"""Which nodes may take part, from what was measured on each: plain numbers in, names out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from statistics import median_high
from typing import Literal

from lctrain.config.launcher import PreflightConfig


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One node. gemm_gflops: its slowest device; clock_skew_s: ahead of the first node; link_gb_s: to its better neighbour."""

    node: str
    versions: dict[str, str]
    memory_gb: float
    disk_gb: float
    gemm_gflops: float
    clock_skew_s: float | None = None
    link_gb_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a node; a broken one must not take part, a slow one slows all others down."""

    node: str
    what: str
    broken: bool


@dataclasses.dataclass(frozen=True)
class Verdict:
    """All problems, and what follows: `start`, requeue without the unfit nodes (`exclude`), or give up (`unfit`)."""

    problems: tuple[Problem, ...]
    action: Literal["start", "exclude", "unfit"]
    unfit: tuple[str, ...]

    @property
    def may_start(self) -> bool:
        return self.action == "start"


def judge(measured: Sequence[Measurement], missing: Sequence[str], settings: PreflightConfig) -> list[Problem]:
    """Every problem of every node; `missing` are the nodes that did not answer.

    Rates are compared with the median node's (of two, the faster one's); versions with what most nodes have.
    """
    problems = [Problem(node, f"no answer within {settings.timeout_s} s", True) for node in missing]
    for name in sorted({name for one in measured for name in one.versions}):
        usual, _ = Counter(one.versions.get(name, "none") for one in measured).most_common(1)[0]
        for one in measured:
            if (has := one.versions.get(name, "none")) != usual:
                problems.append(Problem(one.node, f"{name} is {has}, on most nodes {usual}", True))
    for one in measured:
        if one.memory_gb < settings.min_memory_gb:
            least = f"launcher.preflight.min_memory_gb={settings.min_memory_gb:g}"
            problems.append(Problem(one.node, f"{one.memory_gb:.1f} GB of memory are free, {least}", True))
        if one.disk_gb < settings.min_disk_gb:
            least = f"launcher.preflight.min_disk_gb={settings.min_disk_gb:g}"
            problems.append(Problem(one.node, f"{one.disk_gb:.1f} GB are free under the run directory, {least}", True))
        if one.clock_skew_s is not None and abs(one.clock_skew_s) > settings.max_clock_skew_s:
            ahead = "ahead of" if one.clock_skew_s > 0 else "behind"
            problems.append(Problem(one.node, f"its clock is {abs(one.clock_skew_s):.1f} s {ahead} the first node's", True))
    problems += _slow(settings, "matrix products", "GFLOP/s", [(one.node, one.gemm_gflops) for one in measured])
    links = [(one.node, one.link_gb_s) for one in measured if one.link_gb_s is not None]
    problems += _slow(settings, "network", "GB/s", links)
    return problems


def verdict_of(problems: Sequence[Problem], settings: PreflightConfig) -> Verdict:
    """What the settings want done about the problems."""

    def nodes(policy: str) -> tuple[str, ...]:
        wanted = [problem.node for problem in problems if (settings.broken if problem.broken else settings.slow) == policy]
        return tuple(dict.fromkeys(wanted))

    if stopping := nodes("stop"):
        return Verdict(tuple(problems), "unfit", stopping)
    if excluded := nodes("exclude"):
        return Verdict(tuple(problems), "exclude", excluded)
    return Verdict(tuple(problems), "start", ())


def _slow(settings: PreflightConfig, what: str, unit: str, rates: Sequence[tuple[str, float]]) -> list[Problem]:
    if len(rates) < 2:
        return []
    usual = median_high(rate for _, rate in rates)
    return [
        Problem(node, f"{what}: {rate:.3g} {unit}, the median node {usual:.3g}", False)
        for node, rate in rates
        if rate < settings.slow_fraction * usual
    ]
