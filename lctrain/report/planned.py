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


def planned_otherwise(plan: Any, config: dict[str, Any]) -> str:
    """In which settings a plan's JSON differs from the run's config: `cp 1, here 2`; empty if in none that both tell."""
    if not isinstance(plan, dict):
        return ""
    model, parallel, engine, trainer = (config.get(key) or {} for key in ("model", "parallel", "engine", "trainer"))
    tokens = (trainer.get("global_batch") or 0) * (trainer.get("seq_len") or 0)
    grid = plan.get("grid")
    pairs = [
        ("model", plan.get("model"), model.get("name")),
        ("engine", plan.get("engine"), engine.get("name")),
        *((name, size, parallel.get(name)) for name, size in (grid.items() if isinstance(grid, dict) else ())),
        ("tokens per step", plan.get("tokens_per_step"), tokens),
    ]
    return ", ".join(f"{what} {said}, here {here}" for what, said, here in pairs if said and here and said != here)


def _median(records: Sequence[dict[str, Any]], key: str, unit: float = 1) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return median(values) / unit if values else None
