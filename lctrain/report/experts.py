"""Charts of how evenly experts and routed heads are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lctrain.report.svg import Chart, HeatMap, Line, LineChart

KINDS = {"moe": ("Experts", "expert"), "moh": ("Routed heads", "head")}
"""Prefix of the metrics -> title and name of what is chosen."""

_CURVES = (
    ("entropy", "router entropy", "nats per token", "Of the router's scores; 0 where it always knows"),
    ("dropped", "dropped choices", "share", "Choices beyond an expert's capacity"),
    ("balance_loss", "balancing loss", "loss", "Weighted, mean over micro-batches"),
    ("bias", "largest selection bias", "bias", "By magnitude; moves towards even use"),
)


def expert_charts(
    records: list[dict[str, Any]], marks: Sequence[tuple[float, str]], columns: list[dict[str, Any]]
) -> list[Chart]:
    """For every kind: the last load, the violations over the run, and curves per layer. columns: records for a heat map."""
    charts: list[Chart] = []
    for kind, (title, name) in KINDS.items():
        loads = [record for record in records if record.get(f"{kind}_load")]
        if loads:
            last = loads[-1]
            rows: list[list[float | None]] = [[share * len(row) for share in row] for row in last[f"{kind}_load"]]
            note = f"Share of the choices at step {last['step']} over the even share, 1 is even"
            widest = max(map(len, rows)) - 1
            charts.append(HeatMap(f"{title}: load", note, rows, name, "layer", 0, widest, 2.0, 1.0, row_name="layer"))
        shown = [record for record in columns if record.get(f"{kind}_max_violation")]
        if shown:
            layers = len(shown[-1][f"{kind}_max_violation"])
            rows = [[_of_layer(record, f"{kind}_max_violation", layer) for record in shown] for layer in range(layers)]
            high = max((value for row in rows for value in row if value is not None), default=1.0) or 1.0
            note = "Largest load over the mean load, minus 1; 0 is even"
            ends = (shown[0]["step"], shown[-1]["step"])
            charts.append(HeatMap(f"{title}: max violation", note, rows, "step", "layer", *ends, high, row_name="layer"))
        for key, what, unit, note in _CURVES:
            charts += _per_layer(records, marks, f"{kind}_{key}", f"{title}: {what}", unit, note)
    return charts


def _per_layer(
    records: list[dict[str, Any]], marks: Sequence[tuple[float, str]], key: str, title: str, unit: str, note: str
) -> list[Chart]:
    """A line per layer up to eight, beyond that the lowest, mean and highest of all layers; nothing if all are 0."""
    known = [record for record in records if record.get(key)]
    layers = max((len(record[key]) for record in known), default=0)
    found: dict[str, list[tuple[int, float]]] = {}
    for record in known:
        values = [value for value in record[key] if value is not None]
        if layers <= 8:
            for layer, value in enumerate(record[key]):
                if value is not None:
                    found.setdefault(f"layer {layer}", []).append((record["step"], value))
        elif values:
            for name, value in (("lowest", min(values)), ("mean", sum(values) / len(values)), ("highest", max(values))):
                found.setdefault(name, []).append((record["step"], value))
    if not any(value for rows in found.values() for _, value in rows):
        return []
    lines = [Line(name, [step for step, _ in rows], [value for _, value in rows]) for name, rows in found.items()]
    return [LineChart(title, note, unit, lines, marks, zero=True)]


def _of_layer(record: dict[str, Any], key: str, layer: int) -> float | None:
    values = record[key]
    return values[layer] if layer < len(values) else None
