"""`lctrain bench plan`: planned steps and memory beside those of real engines on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from statistics import median
from typing import Any

from lctrain.attention_choice import attention_shapes
from lctrain.bench.plan_machine import measured_cluster
from lctrain.bench.plan_rank import time_steps
from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.config.bench_plan import Case, PlanBenchConfig
from lctrain.config.cluster import ClusterConfig
from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.console import progress, say, table
from lctrain.engines.quiet import quiet_libraries
from lctrain.launch.ranks import RankPool
from lctrain.plan.plan import make_plan

LAYOUTS: dict[Case, list[str]] = {
    "single": [],
    "cp2": ["parallel.cp=2"],
    "ddp2": ["parallel.dp=2"],
    "fsdp2": ["parallel.dp=2", "engine.data_parallel=fsdp"],
    "tp2": ["engine=megatron", "parallel.tp=2"],
    "pp2": ["engine=megatron", "parallel.pp=2"],
    "zero3": ["engine=deepspeed", "engine.zero=3", "parallel.dp=2"],
}
TIMEOUT_S = 600.0


def bench_plan(config: PlanBenchConfig) -> int:
    """Measure the machine, plan, run, print, store; returns 1 if bytes of weights, gradients or optimizer state differ."""
    check_output(config)
    machine = introduce_machine()
    quiet_libraries()
    runs = {case: _run(config, case) for case in config.cases}
    clusters: dict[int, ClusterConfig] = {}
    with progress("measuring this machine", 2, "numbers of processes") as advance:
        for ranks in sorted({run.processes for run in runs.values()}):
            shape = next(iter(attention_shapes(runs[config.cases[0]]).values()))
            clusters[ranks] = measured_cluster(ranks, shape)
            advance(1)
    _print_machine(clusters)
    results = []
    with progress("layouts", len(runs), "layouts") as advance:
        for case, run in runs.items():
            results.append({"case": case, **_compare(run, clusters[run.processes], config.steps)})
            advance(1)
    print_results(results)
    store(config, "plan", machine, results)
    return int(not all(row["memory_equal"] for row in results))


def _run(config: PlanBenchConfig, case: Case) -> TrainConfig:
    words = [f"model={config.model}", f"trainer.seq_len={config.seq}", "trainer.global_batch=2", "engine.device=cpu"]
    return load(TrainConfig, "train", ["run_dir=none", *words, *LAYOUTS[case]])


def _compare(run: TrainConfig, cluster: ClusterConfig, steps: int) -> dict[str, Any]:
    plan = make_plan(run.model_copy(update={"cluster": cluster}))
    with closing(RankPool(run.processes)) as pool:
        ranks = pool.run(time_steps, run, steps, timeout_s=TIMEOUT_S)
    measured = median(ranks[0].seconds)
    first = [next(rank for rank in ranks if rank.stage == stage) for stage in range(run.parallel.pp)]
    names = ("weights", "gradients", "optimizer")
    planned = [{name: getattr(stage, name) for name in names} for stage in plan.memory]
    held = [{name: rank.memory[name] for name in names} for rank in first]
    return {
        "planned_s": plan.step.total,
        "measured_s": measured,
        "error": plan.step.total / measured - 1,
        "causes_s": {name: value for name, value in vars(plan.step).items() if value},
        "planned_bytes": planned,
        "measured_bytes": held,
        "memory_equal": planned == held,
        "steps_s": ranks[0].seconds,
    }


def _print_machine(clusters: dict[int, ClusterConfig]) -> None:
    for ranks, cluster in clusters.items():
        device, link = cluster.device, cluster.inside
        assert device is not None
        text = (
            f"{ranks} at once: products {device.product_tflops.fp32 * 1e3:.0f} GFLOP/s, memory {device.gb_per_s:.0f} GB/s,"
            f" an operation {device.operation_us:.1f} us besides"
        )
        if link.collective_gb_per_s is not None:
            text += f"; gloo {link.gb_per_s:.2f} GB/s one way, collectives {link.collective_gb_per_s:.2f}"
        say(text)
    say("")


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """Every layout's step and memory, planned and measured."""
    rows = [
        (
            row["case"],
            *(f"{row[f'{what}_s']:.2f}" for what in ("planned", "measured")),
            f"{row['error']:+.0%}",
            *(f"{sum(row[f'{what}_bytes'][0].values()) / 1e6:,.3f}" for what in ("planned", "measured")),
            "equal" if row["memory_equal"] else "DIFFERENT",
        )
        for row in results
    ]
    columns = ("layout", "planned, s", "measured, s", "error", "planned, MB", "measured, MB", "to the byte")
    table(columns, rows, align="lrrrrrl")
    say("seconds: of an optimizer step, measured: median; MB: weights, gradients, optimizer state of the first stage's rank 0")
    say(f"median error {median(abs(row['error']) for row in results):.0%} of step time", style="bold")
