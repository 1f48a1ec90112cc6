"""What `lctrain plan` said of a run, beside what the run did."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from lctrain.report.ticks import number

_MIB = 2**20
_MEMORY = ("weights", "gradients", "optimizer")


def planned_rows(plan: Any, records: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(what, planned, in the run, the latter over the former), from a plan's JSON; empty if it is none.

    Of the run: medians over steps; rank 0's memory, which is a rank of the first stage.
    """
    try:
        processes, step, stage = plan["processes"], plan["step_s"]["total"], plan["memory"][0]
        pairs = [
            ("step, s", step, _median(records, "step_s")),
            ("tokens/s per process", plan["tokens_per_s_per_device"], _median(records, "tokens_per_s", processes)),
            ("MFU, %", 100 * plan["mfu"], _median(records, "mfu", 0.01)),
            *((f"{name}, MiB", stage[name] / _MIB, _median(records, f"memory_{name}_mb")) for name in _MEMORY),
            ("memory, MiB", stage["total"] / _MIB, max((r.get("memory_mb") or 0 for r in records), default=None)),
        ]
        return [
            (what, number(expected, 4), *((number(found, 4), f"{found / expected:.2f}") if found and expected else ("", "")))
            for what, expected, found in pairs
        ]
    except (KeyError, IndexError, TypeError, ZeroDivisionError, OverflowError):
        return []


def _median(records: Sequence[dict[str, Any]], key: str, unit: float = 1) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return median(values) / unit if values else None
