"""`lctrain bench step`: our optimizer step beside transformers' Llama, in turn, each in a process of its own."""

from __future__ import annotations

import os
from contextlib import ExitStack
from statistics import median
from typing import Any

from lctrain.bench.child import Child
from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.bench.step_llama import Llama, why_no_twin
from lctrain.bench.step_ours import Ours, Step
from lctrain.config.bench import StepBenchConfig
from lctrain.console import progress, say, table, warn

SAME_LOSS = {"fp32": 1e-5, "bf16": 1e-2}
"""Largest relative difference of the first losses at which both still compute the same function."""


def bench_step(config: StepBenchConfig) -> int:
    """Measure, print, store; returns 1 if the contenders do not compute the same function."""
    check_output(config)
    machine = introduce_machine()
    threads = config.threads or len(os.sched_getaffinity(0))
    obstacle = why_no_twin(config.model)
    if obstacle:
        warn(f"measured alone: {obstacle}")
    say(f"model {config.model.name}, {config.dtype}, batch {config.batch}, {threads} threads, median of {config.steps} steps\n")
    results = [_measure(config, seq, threads, alone=obstacle is not None) for seq in config.seq]
    _print_contenders(results)
    different = False
    if not obstacle:
        _print_ratios(results)
        different = any(result["loss_difference"][0] > SAME_LOSS[config.dtype] for result in results)
    store(config, "step", machine, results)
    if different:
        warn("the two contenders do not compute the same function, so their times cannot be compared")
    return int(different)


def _measure(config: StepBenchConfig, seq: int, threads: int, alone: bool) -> dict[str, Any]:
    with ExitStack() as stack, progress(f"seq {seq}", config.steps + 1, "steps") as advance:
        contenders = {"lctrain": stack.enter_context(Child(Ours, threads, config, seq))}
        if not alone:
            contenders["transformers"] = stack.enter_context(Child(Llama, threads, config, seq))
        ours = contenders["lctrain"]
        steps: dict[str, list[Step]] = {name: [] for name in contenders}
        gemm = []
        for _ in range(config.steps + 1):
            for name, child in contenders.items():
                steps[name].append(child.call("step"))
            gemm.append(ours.call("gemm_flops"))
            advance(1)
        memory = {name: child.call("memory") for name, child in contenders.items()}
        flops = ours.call("flops")
    result: dict[str, Any] = {"seq": seq, "flops_per_step": flops, "gemm_flops_per_s": max(gemm), "contenders": {}}
    for name, (first, *timed) in steps.items():
        seconds = median(step.seconds for step in timed)
        result["contenders"][name] = {
            "tokens_per_s": config.batch * seq / seconds,
            "step_s": seconds,
            "best_step_s": min(step.seconds for step in timed),
            "cpu_s": median(step.cpu_seconds for step in timed),
            "best_cpu_s": min(step.cpu_seconds for step in timed),
            "after_import_mib": memory[name][0],
            "peak_mib": memory[name][1],
            "mfu": flops / seconds / max(gemm),
            "first_loss": first.loss,
            "first_grad_norm": first.grad_norm,
        }
    if not alone:
        pairs = list(zip(*steps.values(), strict=True))
        result["loss_difference"] = [abs(a.loss - b.loss) / abs(b.loss) for a, b in (pairs[0], pairs[-1])]
    return result


def _print_contenders(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        for name, found in result["contenders"].items():
            rows.append(
                (
                    result["seq"],
                    name,
                    f"{found['tokens_per_s']:,.0f}",
                    f"{found['step_s']:.3f}",
                    f"{found['best_step_s']:.3f}",
                    f"{found['cpu_s']:.3f}",
                    f"{found['peak_mib']:,.0f}",
                    f"{found['after_import_mib']:,.0f}",
                    f"{found['mfu']:.1%}",
                )
            )
    columns = ("seq", "contender", "tokens/s", "step s", "best s", "CPU s", "peak MiB", "after import MiB", "MFU")
    table(columns, rows, align="rlrrrrrrr")
    peaks = ", ".join(f"{result['gemm_flops_per_s'] / 1e9:.0f}" for result in results)
    say(f"MFU is the share of this machine's own matrix product, measured between the steps: {peaks} GFLOP/s\n")


def _print_ratios(results: list[dict[str, Any]]) -> None:
    rows = []
    for result in results:
        ours, theirs = result["contenders"]["lctrain"], result["contenders"]["transformers"]
        above = [found["peak_mib"] - found["after_import_mib"] for found in (ours, theirs)]
        ratios = [ours[key] / theirs[key] for key in ("step_s", "best_step_s", "cpu_s", "best_cpu_s", "peak_mib")]
        first, last = result["loss_difference"]
        rows.append(
            (result["seq"], *(f"{ratio:.3f}" for ratio in [*ratios, above[0] / above[1]]), f"{first:.1e}", f"{last:.1e}")
        )
    columns = ("seq", "step s", "best s", "CPU s", "best CPU s", "peak", "peak above imports", "first loss", "last loss")
    table(columns, rows, "lctrain / transformers (below 1 is better), and the relative difference of their losses", "r" * 9)
