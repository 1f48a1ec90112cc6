"""The two tables of `lctrain bench attention`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lctrain.console import say, table

Row = Mapping[str, Any]


def print_passes(results: Sequence[Row]) -> None:
    """Time, error and memory; ratios to the SDPA row before a group of strategies."""
    rows, yardstick = list[tuple[object, ...]](), results[0]
    for found in results:
        yardstick = found if found["strategy"] == "SDPA" else yardstick
        own = found is yardstick
        rows.append(
            (
                found["seq"],
                found["strategy"],
                1 if own else found["cp"],
                found["threads"],
                *(f"{found[f'{way}_{clock}_s']:.3f}" for clock in ("wall", "cpu") for way in ("forward", "backward")),
                *("" if own else _ratio(found, yardstick, clock) for clock in ("wall", "cpu")),
                " ".join(f"{error:.0e}" for error in found["error"].values()),
                f"{found['memory_mib']:.1f}",
            )
        )
    columns = ("seq", "contender", "ranks", "threads", "wall fwd", "wall bwd", "CPU fwd", "CPU bwd", "wall x", "CPU x")
    table((*columns, "error of out dq dk dv", "MiB"), rows, align="rlrrrrrrrrlr")
    say(
        "seconds, CPU summed over ranks; x: forward and backward over SDPA's with as many threads, of medians (of best passes);"
    )
    say("errors against fp64, relative to the largest entry; MiB: most that a process held beyond its inputs\n")


def print_bytes(results: Sequence[Row]) -> None:
    """Traffic of the strategies, and how evenly the layout deals out the work."""
    rows = []
    for found in results:
        for way in found.get("sent", ()):
            sent, scheduled = ([sum(kinds.values()) for kinds in found[source][way]] for source in ("sent", "scheduled"))
            published = found["published"][way]
            rows.append(
                (
                    found["seq"],
                    found["strategy"],
                    found["cp"],
                    way,
                    _mib(sum(sent) / len(sent)),
                    _mib(max(sent)),
                    _mib(sum(scheduled) / len(scheduled)),
                    "" if published is None else _mib(published),
                    f"{sum(sent) / len(sent) / published:.3f}" if published else "",
                    f"{found['imbalance']:.3f}",
                )
            )
    columns = ("seq", "strategy", "ranks", "direction", "mean", "max", "schedule", "published", "ratio", "imbalance")
    table(columns, rows, "MiB that a rank sends, counted at run time", align="rlrlrrrrrr")
    say("schedule: mean of what its data says; published: what the strategy's published form sends; ratio: mean to that;")
    say("imbalance: most live score entries of a rank over the mean")


def _mib(count: float) -> str:
    return f"{count / 2**20:.3f}"


def _ratio(found: Row, yardstick: Row, clock: str) -> str:
    median, best = (found[name] / yardstick[name] for name in (f"both_{clock}_s", f"best_both_{clock}_s"))
    return f"{median:.3f} ({best:.3f})"
