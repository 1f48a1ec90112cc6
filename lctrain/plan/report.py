"""A plan as tables and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lctrain.console import say, table
from lctrain.plan.plan import Plan
from lctrain.plan.remedies import Remedy
from lctrain.plan.search import Found
from lctrain.plan.step_time import CAUSES

GB = 1e9
MEMORY = ("weights", "gradients", "optimizer", "activations", "working", "buffers")


def print_plan(plan: Plan, run_s: float, run_tokens: int) -> None:
    """Everything. run_s: seconds of the whole run. run_tokens: tokens of the whole run."""
    _print_head(plan)
    _print_memory(plan)
    _print_step(plan)
    _print_run(plan, run_s, run_tokens)


def print_remedies(found: Sequence[Remedy]) -> None:
    """What would help, each with its figures."""
    say()
    rows: list[tuple[object, ...]] = []
    for remedy in found:
        if remedy.plan is None:
            rows.append((remedy.change, "-", "-", "-", f"not possible: {remedy.refused}"))
            continue
        plan = remedy.plan
        verdict = "fits" if plan.fits else "does not fit"
        rows.append((remedy.change, plan.config.processes, gb(plan.most), f"{plan.tokens_per_s:,.0f}", verdict))
    table(("instead, one change at a time", "processes", "GB", "tokens/s each", ""), rows, align="lrrrl")
    if not any(remedy.plan is not None and remedy.plan.fits for remedy in found):
        say("none of them is enough alone; plan.search=true plan.gpus=N tries all layouts of N devices")


def print_found(found: Found, shown: int) -> None:
    """The fastest layouts that fit, or the one that lacks least."""
    rows = []
    for place, plan in enumerate(found.plans[:shown], 1):
        config = plan.config
        grid = config.grid
        checkpointing = "yes" if config.engine.activation_checkpointing == "layer" else "no"
        attention = config.parallel.attention if config.cp > 1 else "-"
        sharding = (config.engine.data_parallel,) if config.engine.name == "torch" else ()
        sizes = (grid["dp"], grid["cp"], grid["tp"], grid["pp"])
        speed = (f"{plan.tokens_per_s:,.0f}", f"{plan.mfu:.1%}", f"{plan.step.total:.3g}", gb(plan.most))
        rows.append((place, *sizes, attention, *sharding, checkpointing, *speed))
    sharded = ("sharding",) if any(plan.config.engine.name == "torch" for plan in found.plans) else ()
    if rows:
        columns = ("", "dp", "cp", "tp", "pp", "attention", *sharded, "checkpointing", "tokens/s each", "MFU", "step s", "GB")
        table(columns, rows, align="rrrrrl" + "l" * len(sharded) + "lrrrr")
        say()
        say(f"best: {words(found.plans[0])}", style="bold")
    elif found.least is None:
        say("nothing fits: weights, gradients and optimizer state alone take more than there is", style="red")
    else:
        least = found.least
        say(f"nothing fits; least of all lacks {words(least)}: {gb(least.most)} GB of {gb(least.limit)}", style="red")
    refused = f"; the config's checks refuse {found.refused} more (such as: {found.reason})" if found.refused else ""
    say(f"{len(found.plans)} layouts fit, {found.dropped} do not{refused}")


def words(plan: Plan) -> str:
    """A layout as overrides of `lctrain train`."""
    config = plan.config
    grid, parallel, engine = config.grid, config.parallel, config.engine
    found = [f"parallel.{name}={size}" for name, size in grid.items() if size > 1]
    if config.cp > 1:
        found.append(f"parallel.attention={parallel.attention}")
    if engine.data_parallel == "fsdp":
        found.append("engine.data_parallel=fsdp")
    if engine.activation_checkpointing == "layer":
        found.append("engine.activation_checkpointing=layer")
    return " ".join(found)


def as_dict(plan: Plan, run_s: float | None = None) -> dict[str, Any]:
    """A plan for JSON. Bytes, seconds, FLOPs."""
    config = plan.config
    return {
        "model": config.model.name,
        "parameters": plan.size.total,
        "active_parameters": plan.size.active,
        "cluster": plan.cluster.name,
        "engine": config.engine.name,
        "processes": config.processes,
        "grid": config.grid,
        "settings": settings_of(plan),
        "flops_per_step": plan.flops,
        "tokens_per_step": plan.tokens,
        "memory": [{**dataclasses.asdict(stage), "total": stage.total} for stage in plan.memory],
        "memory_limit": plan.limit,
        "fits": plan.fits,
        "step_s": {**dataclasses.asdict(plan.step), "total": plan.step.total},
        "tokens_per_s_per_device": plan.tokens_per_s,
        "mfu": plan.mfu,
        "sent_bytes_per_step": dict(plan.sent),
        **({} if run_s is None else {"run_s": run_s, "run_device_hours": run_s * config.processes / 3600}),
    }


def settings_of(plan: Plan) -> dict[str, Any]:
    """What of the layout is not in the grid."""
    engine, parallel = plan.config.engine, plan.config.parallel
    found: dict[str, Any] = {"dtype": engine.dtype, "activation_checkpointing": engine.activation_checkpointing}
    if parallel.ep * parallel.etp > 1:
        found |= {"ep": parallel.ep, "etp": parallel.etp}
    if parallel.virtual_stages > 1:
        found["virtual_stages"] = parallel.virtual_stages
    if engine.name == "torch" and plan.config.processes > 1:
        found["data_parallel"] = engine.data_parallel
    if engine.name == "deepspeed":
        found["zero"] = engine.zero
    return found | {f"attention {symbol}": name for symbol, name in plan.strategies.items()}


def gb(size: float) -> str:
    """Bytes in 1e9, with a sensible number of digits."""
    return f"{size / GB:,.1f}" if size >= GB else f"{size / GB:.3f}"


def duration(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _print_head(plan: Plan) -> None:
    config, trainer = plan.config, plan.config.trainer
    active = f" ({count(plan.size.active)} active)" if plan.size.active != plan.size.total else ""
    say(f"{config.model.name}, {count(plan.size.total)} parameters{active}, on {plan.cluster.name}", style="bold")
    say(f"{config.mesh(0, config.processes).sizes}; engine {config.engine.name}, {config.engine.dtype}")
    say(
        f"a step is {trainer.global_batch} samples of {trainer.seq_len:,} tokens, {plan.tokens:,} in all,"
        f" and {count(plan.flops)} FLOPs"
    )
    for symbol, name in plan.strategies.items():
        say(f"attention of {symbol} layers: {name}, layout {config.parallel.layout}")
    say()


def _print_memory(plan: Plan) -> None:
    rows = [
        (index, *(gb(getattr(stage, name)) for name in MEMORY), gb(stage.total), "yes" if stage.total <= plan.limit else "NO")
        for index, stage in enumerate(plan.memory)
    ]
    title = "GB of a rank, by pipeline stage" if len(rows) > 1 else "GB of a rank"
    table(("stage", *MEMORY, "total", "fits"), rows, title=title, align="r" * 8 + "l")
    assert plan.cluster.device is not None
    whole = plan.cluster.device.memory_gb * GB
    reserve = f"{gb(plan.limit)} GB, a device's {gb(whole)} less {1 - plan.limit / whole:.0%} in reserve"
    if plan.fits:
        say(f"fits: {gb(plan.most)} of {reserve}", style="green")
    else:
        say(f"DOES NOT FIT: {gb(plan.most)} GB, but there are {reserve}", style="red")
    say()


def _print_step(plan: Plan) -> None:
    total = plan.step.total
    rows = [
        (name, f"{seconds:.4g}", f"{seconds / total:.1%}")
        for field, name in CAUSES.items()
        if (seconds := getattr(plan.step, field)) > 1e-6 * total
    ]
    table(("a step", "seconds", "share"), [*rows, ("in all", f"{total:.4g}", "")], align="lrr")
    peak = f"100 % is {plan.peak / 1e12:,.4g} TFLOP/s"
    say(f"{plan.tokens_per_s:,.0f} tokens/s per device, MFU {plan.mfu:.1%} ({peak})", style="bold")
    sent = ", ".join(f"{name.replace('_', ' x ')} {gb(size)}" for name, size in plan.sent.items() if size)
    if sent:
        say(f"GB that a rank sends in a step, by dimension: {sent}")
    say()


def _print_run(plan: Plan, run_s: float, run_tokens: int) -> None:
    config = plan.config
    hours = run_s * config.processes / 3600
    spent = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
    unit = "core-hours" if plan.cluster.cpu_s_per_gb else "GPU-hours"
    say(f"the run: {config.trainer.steps:,} steps, {count(run_tokens)} tokens, {duration(run_s)}, {spent} {unit}")


def count(number: float) -> str:
    """A large number for people: 8.03 B."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"
