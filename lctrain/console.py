"""What people read: colours, tables and progress bars on a terminal; plain, unwrapped lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

console = Console(highlight=False)
"""Standard output."""
errors = Console(stderr=True, highlight=False)
"""Standard error."""

PLAIN_INTERVAL_S = 10.0
"""Seconds between progress lines where there is no terminal to draw a bar on."""


def say(text: str = "", style: str | None = None) -> None:
    """Print a line as it is: no markup, no wrapping."""
    console.print(text, style=style, markup=False, soft_wrap=True)


def counted(number: int, what: str) -> str:
    """`1 case`, `1,280 cases`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def warn(text: str) -> None:
    """Print a warning to standard error."""
    errors.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None, align: str = "") -> None:
    """Print a table; `align` has one letter per column, r for numbers (default: l)."""
    align = align.ljust(len(columns), "l")
    texts = [[str(cell) for cell in row] for row in rows]
    if console.is_terminal:
        drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name, side in zip(columns, align, strict=True):
            drawn.add_column(name, justify="right" if side == "r" else "left", overflow="fold")
        for row in texts:
            drawn.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(drawn)
        return
    if title:
        say(title)
    lines = [list(columns), *texts]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(line, widths, align, strict=True)
        )
        say("  ".join(cells).rstrip())


@contextmanager
def progress(what: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
    """Show how far a task has come, with the time left; yields a function to call with every amount done.

    A unit of `B` is shown as kB, MB, GB.
    """
    if console.is_terminal:
        with _bar(what, total, unit) as advance:
            yield advance
        return
    begin = shown = time.monotonic()
    done = 0.0

    def advance_plain(amount: float) -> None:
        nonlocal done, shown
        done += amount
        now = time.monotonic()
        if now - shown >= PLAIN_INTERVAL_S:
            shown = now
            share = f"{done / total:.0%}" if total else "?"
            left = f", {(now - begin) * (total - done) / done:.0f} s left" if total and done else ""
            say(f"{what}: {share}{left}")

    yield advance_plain
    say(f"{what}: done in {time.monotonic() - begin:.1f} s")


@contextmanager
def _bar(what: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    counter: ProgressColumn = DownloadColumn() if unit == "B" else MofNCompleteColumn()
    suffix = "" if unit == "B" else unit
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), counter, TextColumn(suffix), TimeRemainingColumn()]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total or None)
        yield lambda amount: bar.advance(task, amount)
