"""Which charts a run's records can fill, in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lctrain.report.experts import expert_charts
from lctrain.report.recall import recall_charts
from lctrain.report.svg import Chart, HeatMap, Line, LineChart
from lctrain.tracking.series import series, smooth

Records = list[dict[str, Any]]
Marks = Sequence[tuple[float, str]]

MOMENTS = (0.1, 0.4, 1.0)
"""Shares of the run after which loss by position is drawn; each is a mean over the tenth of the run before it."""
MOST_COLUMNS = 150
"""Steps side by side in a heat map; of longer runs, evenly spaced ones."""


class Group(NamedTuple):
    """Charts under one heading."""

    title: str
    charts: list[Chart]


def make_groups(records: Records, events: list[dict[str, Any]], restarts: list[int]) -> list[Group]:
    """All charts for which there are values; records: one or more."""
    marks = [(float(step), f"restart after step {step}") for step in restarts]
    groups = [
        Group("Learning", _learning(records, marks)),
        Group("Long context", _long_context(records, marks)),
        Group("Experts", expert_charts(records, marks, evenly(records, MOST_COLUMNS))),
        Group("Speed", _speed(records, marks)),
        Group("Processes", _processes(records, marks)),
        Group("Memory and checkpoints", _memory(records, events, marks)),
    ]
    return [group for group in groups if group.charts]


def evenly(records: Records, most: int) -> Records:
    """At most `most` of the records, evenly spaced, the last one among them."""
    if len(records) <= most:
        return records
    return [records[round(number * (len(records) - 1) / (most - 1))] for number in range(most)]


def curve(
    records: Records,
    marks: Marks,
    title: str,
    note: str,
    unit: str,
    keys: dict[str, str],
    factor: float = 1.0,
    zero: bool = False,
    smoothed: bool = False,
) -> list[Chart]:
    """A chart of metrics by step; keys: metric -> label. Nothing if no record has any of them."""
    lines = []
    for key, label in keys.items():
        steps, values = series(records, key)
        values = [value * factor for value in values]
        if not steps:
            continue
        if smoothed and len(values) >= 20:
            lines.append(Line(f"{label}, each step", steps, values, faint=True))
            values = smooth(values)
        lines.append(Line(label, steps, values))
    return [LineChart(title, note, unit, lines, marks, zero=zero)] if lines else []


def _learning(records: Records, marks: Marks) -> list[Chart]:
    loss = curve(records, marks, "", "", "", {"loss": "training"}, smoothed=True)
    steps, values = series(records, "eval_loss")
    lines = [*(line for chart in loss if isinstance(chart, LineChart) for line in chart.lines)]
    if steps:
        lines.append(Line("held-out", steps, values, points=True))
    skipped = [(float(r["step"]), f"step {r['step']} was skipped: not finite") for r in records if r.get("skipped")]
    charts: list[Chart] = []
    if lines:
        note = "Mean cross-entropy over all targets of the global batch"
        note += f"; {len(skipped)} steps were skipped" if skipped else ""
        charts.append(LineChart("Loss", note, "nats per token", lines, [*marks, *skipped]))
    note = "L2 norm over all parameters, before clipping"
    charts += curve(records, marks, "Gradient norm", note, "norm", {"grad_norm": "norm"}, zero=True, smoothed=True)
    charts += curve(records, marks, "Learning rate", "Of the step's update", "rate", {"lr": "rate"}, zero=True)
    return charts


def _long_context(records: Records, marks: Marks) -> list[Chart]:
    charts: list[Chart] = []
    known = [record for record in records if record.get("loss_by_position")]
    if known:
        lines: list[Line] = []
        for share in MOMENTS:
            end = max(1, round(share * len(known)))
            profile = _mean_profile(known[max(0, end - max(1, len(known) // 10)) : end])
            if end and (not lines or len(known) >= 10):
                lines.append(Line(f"step {known[end - 1]['step']}", list(profile), list(profile.values()), points=True))
        if len(lines) == 1:
            profile = _mean_profile(known)
            lines = [Line(f"step {known[-1]['step']}", list(profile), list(profile.values()), points=True)]
        note = "By how many tokens of its document the model sees; falling to the right, it uses them"
        x_label = "tokens of context (up to this power of two)"
        charts.append(LineChart("Loss by position", note, "nats per token", lines, x_label=x_label, powers=True))
        shown = sorted({bucket for record in known for bucket in _profile(record)})
        chosen = [shown[round(i * (len(shown) - 1) / max(1, min(5, len(shown)) - 1))] for i in range(min(5, len(shown)))]
        lines = []
        for bucket in chosen:
            rows = [(record["step"], _profile(record)[bucket]) for record in known if bucket in _profile(record)]
            values = [value for _, value in rows]
            name = f"{2 ** (bucket - 1) + 1:,} to {2**bucket:,}" if bucket > 1 else str(2**bucket)
            lines.append(Line(f"context {name}", [step for step, _ in rows], smooth(values) if len(values) >= 20 else values))
        note = "Targets that see so many tokens of their document, averaged over neighbouring steps"
        charts.append(LineChart("Loss by position over the run", note, "nats per token", lines, marks))
    charts += recall_charts(records, marks)
    note = "Attention work if all were as busy as each step's busiest context-parallel rank, over the real work; 1 is even"
    charts += curve(records, marks, "Context-parallel imbalance", note, "ratio", {"cp_imbalance": "imbalance"})
    return charts


def _speed(records: Records, marks: Marks) -> list[Chart]:
    charts = curve(
        records, marks, "Throughput", "Tokens of the global batch over the step's time", "tokens/s",
        {"tokens_per_s": "tokens/s"}, zero=True, smoothed=True,
    )  # fmt: skip
    note = "Share of the processes' peak arithmetic that the model's FLOPs need, counting only live attention inside documents"
    charts += curve(records, marks, "Model FLOPs utilisation", note, "%", {"mfu": "MFU"}, 100, zero=True, smoothed=True)
    note = "From the agreement on the batch to the end of the update"
    charts += curve(records, marks, "Step time", note, "s", {"step_s": "step"}, zero=True, smoothed=True)
    note = "What the loop stood still for the next batch"
    charts += curve(records, marks, "Data wait", note, "ms", {"data_wait_s": "wait"}, 1000, zero=True)
    total_s = tokens = 0.0
    hours, seen = [], []
    for record in records:
        total_s, tokens = total_s + (record.get("step_s") or 0.0), tokens + (record.get("tokens") or 0)
        hours.append(total_s / 60)
        seen.append(tokens)
    if tokens:
        note = "Without start-up, evaluation, checkpoints and work that a crash has lost"
        charts.append(LineChart("Tokens trained on", note, "tokens", [Line("tokens", hours, seen)], x_label="minutes of steps"))
    return charts


def _processes(records: Records, marks: Marks) -> list[Chart]:
    charts: list[Chart] = []
    note = "How much longer the slowest rank's own forward work takes than the mean rank's"
    charts += curve(records, marks, "Slowest rank", note, "%", {"slowest_rank_excess": "excess"}, 100, zero=True)
    times = [record for record in records if record.get("rank_forward_s")]
    if times and len(times[-1]["rank_forward_s"]) > 1:
        ranks = len(times[-1]["rank_forward_s"])
        times = [record for record in times if len(record["rank_forward_s"]) == ranks]
        shown = evenly(times, MOST_COLUMNS)
        columns = [
            [value / (sum(record["rank_forward_s"]) / ranks or 1) for value in record["rank_forward_s"]] for record in shown
        ]
        rows: list[list[float | None]] = [[column[rank] for column in columns] for rank in range(ranks)]
        note = "Own forward time over the mean of all ranks in the same step: a red row is a slow machine"
        charts.append(
            HeatMap("Time by rank", note, rows, "step", "rank", shown[0]["step"], shown[-1]["step"], 1.5, 1.0, row_name="rank")
        )
    note = "Waiting for messages of attention, recurrent layers, experts and tensor parallelism, mean over ranks"
    charts += curve(
        records,
        marks,
        "Exposed communication",
        note,
        "% of the step",
        {"exposed_comm": "waiting"},
        100,
        zero=True,
        smoothed=True,
    )
    return charts


def _memory(records: Records, events: list[dict[str, Any]], marks: Marks) -> list[Chart]:
    note = "Most held so far by rank 0: allocated on a GPU, resident on CPU"
    charts = curve(records, marks, "Peak memory", note, "MiB", {"memory_mb": "peak"}, zero=True)
    kinds = {"weights": "weights", "gradients": "gradients", "optimizer": "optimizer state", "rest": "everything else"}
    note = "Rank 0's peak: what the model needs whatever the batch, and the rest (activations, buffers, libraries)"
    charts += curve(
        records, marks, "Memory by kind", note, "MiB", {f"memory_{kind}_mb": label for kind, label in kinds.items()}, zero=True
    )
    saves = [event for event in events if event.get("kind") == "checkpoint" and event.get("seconds") is not None]
    if saves:
        steps, seconds = [event.get("step", 0) for event in saves], [float(event["seconds"]) for event in saves]
        lines, note = [Line("save", steps, seconds, points=True)], "What each save held the loop up"
        if any("stall_s" in event for event in saves):  # of others, the loop waits for all of the save
            waits = [float(event.get("stall_s", event["seconds"])) for event in saves]
            lines = [Line("until it is on disk", steps, seconds, points=True), Line("steps wait", steps, waits, points=True)]
            note = "Saves in the background: how long each took, and what of it the loop waited for"
        charts.append(LineChart("Checkpoint time", note, "s", lines, marks, zero=True))
    return charts


def _profile(record: dict[str, Any]) -> dict[int, float]:
    """Bucket -> loss, of those that had targets."""
    return {bucket: value for bucket, value in enumerate(record["loss_by_position"]) if value is not None}


def _mean_profile(records: Records) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for record in records:
        for bucket, value in _profile(record).items():
            found.setdefault(bucket, []).append(value)
    return {bucket: sum(values) / len(values) for bucket, values in sorted(found.items())}
