"""`lctrain bench ssd`: our scan, or our Mamba-2 layer, beside transformers' torch path and the token-by-token recurrence."""

from __future__ import annotations

import importlib.util
import os
from contextlib import ExitStack
from typing import Any

from lctrain.bench.child import Child
from lctrain.bench.passes import COLUMNS, both_s, cells, differ, differences, take_turns
from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.bench.ssd_contenders import Contender
from lctrain.config.bench_ssd import SsdBenchConfig
from lctrain.console import progress, say, table, warn
from lctrain.models.recurrent import scan_flops


def bench_ssd(config: SsdBenchConfig) -> int:
    """Measure, print, store; returns 1 if the contenders do not compute the same function."""
    check_output(config)
    machine = introduce_machine()
    threads = config.threads or len(os.sched_getaffinity(0))
    say(
        f"{config.part}, {config.heads} heads of {config.head_dim}, state {config.state}, groups {config.groups},"
        f" batch {config.batch}, {config.dtype}, {threads} threads, median of {config.repeats} passes\n"
    )
    rivals = ["lctrain"]
    obstacle = _why_no_transformers(config)
    if obstacle:
        warn(f"measured without transformers: {obstacle}")
    else:
        rivals.append("transformers")
    results = []
    if config.recurrence and config.part == "scan":
        results.append(_measure(config, config.recurrence, ["lctrain", "recurrence"], threads))
    results += [_measure(config, seq, rivals, threads) for seq in config.seq]
    _print(results, config.seq[0])
    store(config, "ssd", machine, results)
    wrong = [result for result in results if differ(result, config.dtype)]
    for result in wrong:
        warn(f"at {result['seq']} tokens the contenders do not compute the same function: {result['errors']}")
    return int(bool(wrong))


def _why_no_transformers(config: SsdBenchConfig) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "it is not installed: pip install 'lctrain[hf]'"
    if config.documents != (1,):
        return "its torch path knows no packed documents"
    return None


def _measure(config: SsdBenchConfig, seq: int, names: list[str], threads: int) -> dict[str, Any]:
    """Passes of all contenders in turn; where it is the shortest length, their results are compared too."""
    with ExitStack() as stack, progress(f"seq {seq}", config.repeats + 1, "passes") as advance:
        contenders = {name: stack.enter_context(Child(Contender, threads, config, seq, name)) for name in names}
        gemm: list[float] = []

        def after_each() -> None:
            gemm.append(contenders["lctrain"].call("gemm_flops"))
            advance(1)

        found = take_turns(contenders, config.repeats, after_each)
        result: dict[str, Any] = {"seq": seq, "gemm_flops_per_s": max(gemm), "contenders": found}
        if len(names) > 1 and seq in (min(config.seq), config.recurrence):
            result["errors"] = differences(*(child.call("results") for child in contenders.values()))
    if config.part == "scan":
        flops = 3 * config.batch * scan_flops(seq, config.heads, config.head_dim, config.groups, config.state, config.chunk)
        result["gemm_share"] = flops / both_s(found["lctrain"]) / max(gemm)
    return result


def _print(results: list[dict[str, Any]], shortest: int) -> None:
    rows = []
    first = {name: result for result in results if result["seq"] == shortest for name in result["contenders"]}
    for result in results:
        for name, found in result["contenders"].items():
            start = first.get(name, result)["contenders"][name]
            ours = result["contenders"]["lctrain"]
            rows.append((f"{result['seq']:,}", *cells(name, found, ours), f"{both_s(found) / both_s(start):.2f}"))
    columns = ("seq", *COLUMNS, f"/ own at {shortest:,}")
    table(columns, rows, "forward and backward; memory above the inputs", "rlrrrrrrr")
    for result in results:
        if "errors" in result:
            worst = max(result["errors"].items(), key=lambda pair: pair[1])
            say(f"at {result['seq']:,} tokens results differ by at most {worst[1]:.1e} ({worst[0]}), relative to the largest")
    shares = [f"{result['gemm_share']:.2f}" for result in results if "gemm_share" in result]
    if shares:
        say(f"share of this machine's own matrix product, in the order of the rows: {', '.join(shares)}")
