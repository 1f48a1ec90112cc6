"""`lctrain bench moe`: grouped experts beside loops over experts and a dense network of as many operations."""

from __future__ import annotations

import os
from contextlib import ExitStack
from statistics import median
from typing import Any

from lctrain.bench.child import Child
from lctrain.bench.moe_contenders import Contender, Pass
from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.config.bench_moe import MoeBenchConfig
from lctrain.console import progress, say, table, warn

NAMES = {"experts": ("lctrain", "loop", "split", "dense"), "layer": ("lctrain", "loop", "dense")}
"""Contenders by part; see lctrain.bench.moe_contenders."""
SAME = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest relative difference of outputs and gradients at which ours and the loop still compute the same function."""


def bench_moe(config: MoeBenchConfig) -> int:
    """Measure, print, store; returns 1 if ours and the loop do not compute the same function."""
    check_output(config)
    machine = introduce_machine()
    threads = config.threads or len(os.sched_getaffinity(0))
    say(
        f"{config.part}: d_model {config.d_model}, d_ff {config.d_ff}, {config.top_k} experts per token, batch {config.batch},"
        f" {config.dtype}, {threads} threads, median of {config.repeats} passes\n"
    )
    results = [_measure(config, seq, experts, threads) for seq in config.seq for experts in config.experts]
    _print(results)
    store(config, "moe", machine, results)
    wrong = [result for result in results if any(error > SAME[config.dtype] for error in result["errors"].values())]
    for result in wrong:
        warn(f"with {result['experts']} experts ours and the loop do not compute the same function: {result['errors']}")
    return int(bool(wrong))


def _measure(config: MoeBenchConfig, seq: int, experts: int, threads: int) -> dict[str, Any]:
    """Passes of all contenders in turn, then a comparison of results."""
    title = f"seq {seq}, {experts} experts"
    names = NAMES[config.part]
    with ExitStack() as stack, progress(title, config.repeats + 1, "passes") as advance:
        contenders = {name: stack.enter_context(Child(Contender, threads, config, seq, experts, name)) for name in names}
        passes: dict[str, list[Pass]] = {name: [] for name in names}
        for _ in range(config.repeats + 1):
            for name, child in contenders.items():
                passes[name].append(child.call("run"))
            advance(1)
        ours, loop = (contenders[name].call("results") for name in ("lctrain", "loop"))
    result: dict[str, Any] = {"seq": seq, "experts": experts, "contenders": {}}
    result["errors"] = {name: float(abs(ours[name] - loop[name]).max() / max(abs(loop[name]).max(), 1e-30)) for name in loop}
    for name, (_, *timed) in passes.items():
        forward, backward = (median(t) for t in zip(*[(p.forward_s, p.backward_s) for p in timed], strict=True))
        result["contenders"][name] = {
            "forward_s": forward,
            "backward_s": backward,
            "cpu_s": median(p.cpu_s for p in timed),
            "best_cpu_s": min(p.cpu_s for p in timed),
            "memory_mib": max(p.memory_mib for p in timed),
        }
    return result


def _print(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        ours = result["contenders"]["lctrain"]
        for name, found in result["contenders"].items():
            both, own = (entry["forward_s"] + entry["backward_s"] for entry in (found, ours))
            rows.append(
                (
                    f"{result['seq']:,}",
                    str(result["experts"]),
                    name,
                    f"{found['forward_s']:.3f}",
                    f"{found['backward_s']:.3f}",
                    f"{found['cpu_s']:.3f}",
                    f"{found['memory_mib']:,.0f}",
                    f"{both / own:.2f}",
                    f"{found['best_cpu_s'] / ours['best_cpu_s']:.2f}",
                )
            )
    columns = ("seq", "experts", "contender", "forward s", "backward s", "CPU s", "MiB", "/ ours", "/ ours, best CPU")
    table(columns, rows, "forward and backward; memory above inputs and weights", "rrlrrrrrr")
    worst = max(max(result["errors"].values()) for result in results)
    say(f"ours and the loop differ by at most {worst:.1e}, relative to the largest entry")
