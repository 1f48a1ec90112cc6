"""The tables of `lctrain bench attention --peers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lctrain.bench.attention_results import DIRECTIONS
from lctrain.console import say, table

Row = Mapping[str, Any]
COLUMNS = (
    *("contender", "ranks", "kernel", "error of out dq dk dv"),
    *("wall fwd", "wall bwd", "CPU fwd", "CPU bwd", "CPU x", "sent fwd", "sent bwd", "extra MiB"),
)


def print_contenders(title: str, results: Sequence[Row]) -> None:
    """One row for each contender, also for those that could not take part."""
    yardstick, rows, absent = results[0], [], []
    for found in results:
        if "why_not" in found:
            absent.append(f"{found['contender']} on {found['cp']} ranks {found['why_not']}")
            continue
        own = found["family"] is None
        yardstick = found if own else yardstick
        wrong = "" if found["exact"] or None in found["error"].values() else " WRONG"
        rows.append(
            (
                found["contender"],
                1 if own else found["cp"],
                found["kernel"],
                " ".join("-" if error is None else f"{error:.0e}" for error in found["error"].values()) + wrong,
                *(_seconds(found[f"{way}_{clock}_s"]) for clock in ("wall", "cpu") for way in DIRECTIONS),
                "" if own or found["both_cpu_s"] is None else f"{found['both_cpu_s'] / yardstick['both_cpu_s']:.3f}",
                *("" if own else _mib(found, way) for way in DIRECTIONS),
                f"{found['memory_mib']:.1f}",
            )
        )
    say()
    table(COLUMNS, rows, title, align="lrll" + "r" * 8)
    for line in absent:
        say(line)


def print_bars(results: Sequence[Row]) -> None:
    """Ours against the best exact peer of its family, and CPU-seconds against one process."""
    rows = []
    for found in results:
        if not found["ours"] or "why_not" in found:
            continue
        alike = [row for row in results if all(row[key] == found[key] for key in ("seq", "kv_heads", "dtype", "cp"))]
        exact = [row for row in alike if row.get("exact") and not row["ours"] and row["family"]]
        yardstick = next(row for row in alike if row["family"] is None)
        peers = [row for row in exact if row["family"] == found["family"]]
        fewest = min((_total(row) for row in peers), default=None)
        least = min((row["memory_mib"] for row in exact), default=None)
        rows.append(
            (
                *(found[key] for key in ("seq", "kv_heads", "dtype", "cp", "contender")),
                f"{_total(found) / 2**20:.2f}",
                "" if fewest is None else f"{fewest / 2**20:.2f}",
                f"{found['both_cpu_s'] / yardstick['both_cpu_s']:.3f}",
                f"{found['memory_mib']:.1f}",
                "" if least is None else f"{least:.1f}",
            )
        )
    columns = ("seq", "KV heads", "dtype", "ranks", "contender", "sent", "best peer's", "CPU x", "extra MiB", "least of peers")
    say()
    table(columns, rows, "Ours beside the best exact peer", align="rrlrlrrrrr")
    say("wall, CPU: median seconds, CPU summed over ranks; CPU x: forward and backward over SDPA's in one process;")
    say("sent: MiB a rank, mean over ranks, forward and backward, beside the exact peer of the same family that sends least;")
    say("errors against fp64, relative to the largest entry; extra: most that a process held beyond its inputs, beside the")
    say("exact peer of any family that holds least")


def _total(found: Row) -> float:
    return sum(sum(found["sent"][way]) for way in DIRECTIONS) / found["cp"]


def _mib(found: Row, way: str) -> str:
    sent = found["sent"][way]
    return "-" if found[f"{way}_wall_s"] is None else f"{sum(sent) / len(sent) / 2**20:.2f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
