"""Charts of the recall probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lctrain.report.svg import Chart, HeatMap, Line, LineChart

PREFIX = "recall_"


def recall_charts(records: list[dict[str, Any]], marks: Sequence[tuple[float, str]]) -> list[Chart]:
    """The latest probe by length and depth, and the mean over depths during the run; nothing without probes."""
    probes = [record for record in records if _lengths(record)]
    if not probes:
        return []
    last = probes[-1]
    lengths = _lengths(last)
    rows: list[list[float | None]] = [[_percent(value) for value in last[f"{PREFIX}{length}"]] for length in lengths]
    note = f"Step {last['step']}: loss that a passage saves because the model has seen it; rows: tokens of context"
    charts: list[Chart] = [
        HeatMap(
            "Recall by depth",
            note,
            rows,
            "place of the passage in its context, %",
            "tokens",
            0,
            100,
            100.0,
            row_name="context",
            row_labels=[f"{length:,}" for length in lengths],
            unit=" %",
        )
    ]
    lines = []
    for length in sorted({length for record in probes for length in _lengths(record)}, reverse=True):
        known = [(record["step"], record[f"{PREFIX}{length}"]) for record in probes if f"{PREFIX}{length}" in record]
        means = [(step, [value for value in values if value is not None]) for step, values in known]
        points = [(step, 100 * sum(values) / len(values)) for step, values in means if values]
        lines.append(Line(f"{length:,} tokens", [step for step, _ in points], [mean for _, mean in points], points=True))
    if any(line.xs for line in lines):
        note = "The same, mean over all places: 100 is copied without doubt, 0 is no use of the context"
        charts.append(LineChart("Recall over the run", note, "% of the loss", lines, marks))
    return charts


def _lengths(record: dict[str, Any]) -> list[int]:
    """Context lengths of a record's probe, longest first."""
    found = [key.removeprefix(PREFIX) for key, value in record.items() if key.startswith(PREFIX) and isinstance(value, list)]
    return sorted((int(length) for length in found if length.isdigit()), reverse=True)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
