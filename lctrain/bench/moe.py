"""`lctrain bench moe`: grouped experts beside loops over experts and a dense network of as many operations."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from lctrain.bench.child import Child
from lctrain.bench.moe_contenders import Contender
from lctrain.bench.passes import COLUMNS, cells, differ, differences, take_turns
from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.config.bench_moe import MoeBenchConfig
from lctrain.console import progress, say, table, warn

NAMES = {"experts": ("lctrain", "loop", "split", "dense"), "layer": ("lctrain", "loop", "dense")}
"""Contenders by part; see lctrain.bench.moe_contenders."""


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
    wrong = [result for result in results if differ(result, config.dtype)]
    for result in wrong:
        warn(f"with {result['experts']} experts ours and the loop do not compute the same function: {result['errors']}")
    return int(bool(wrong))


def _measure(config: MoeBenchConfig, seq: int, experts: int, threads: int) -> dict[str, Any]:
    """Passes of all contenders in turn, then a comparison of results."""
    title = f"seq {seq}, {experts} experts"
    names = NAMES[config.part]
    with ExitStack() as stack, progress(title, config.repeats + 1, "passes") as advance:
        contenders = {name: stack.enter_context(Child(Contender, threads, config, seq, experts, name)) for name in names}
        found = take_turns(contenders, config.repeats, lambda: advance(1))
        errors = differences(*(contenders[name].call("results") for name in ("lctrain", "loop")))
    return {"seq": seq, "experts": experts, "contenders": found, "errors": errors}


def _print(results: list[dict[str, Any]]) -> None:
    rows = [
        (f"{result['seq']:,}", str(result["experts"]), *cells(name, found, result["contenders"]["lctrain"]))
        for result in results
        for name, found in result["contenders"].items()
    ]
    table(("seq", "experts", *COLUMNS), rows, "forward and backward; memory above inputs and weights", "rrlrrrrrr")
    worst = max(max(result["errors"].values()) for result in results)
    say(f"ours and the loop differ by at most {worst:.1e}, relative to the largest entry")
