"""One readable line per step, and on a terminal a progress bar below them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lctrain.console import console


class ConsoleLine:
    """Prints steps; plain lines when the output is not a terminal, and nothing any more once the output is gone."""

    def __init__(self, total_steps: int, every: int, start_step: int, console: Console = console) -> None:
        self._total, self._every = total_steps, every
        self._recent: deque[tuple[int, float]] = deque([(start_step, time.monotonic())], maxlen=50)
        self._console = console
        self._progress: Progress | None = None
        self._gone = False
        if self._console.is_terminal:
            bar = TextColumn("{task.completed}/{task.total}"), BarColumn(bar_width=None), TextColumn("{task.fields[left]}")
            self._progress = Progress(*bar, console=self._console, auto_refresh=False, transient=True)
            self._task = self._progress.add_task("", total=total_steps, completed=start_step, left="")
            self._progress.start()

    def step(self, record: dict[str, Any]) -> None:
        """Show a record if its step is due: multiples of `every`, the last step, evaluations, probes and skipped updates."""
        step = int(record["step"])
        self._recent.append((step, time.monotonic()))
        left = self._time_left(step)
        shown = any(record.get(key) is not None for key in ("eval_loss", "recall")) or record.get("skipped")
        if step % self._every == 0 or step == self._total or shown:
            self.message(format_line(record, self._total, left))
        if self._progress:
            with self._survive():
                self._progress.update(self._task, completed=step, left=f"{left} left", refresh=True)

    def message(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._gone:
            return
        with self._survive():
            if self._progress:
                self._console.print(text, markup=False, soft_wrap=True)
            else:
                print(text, flush=True)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._progress:
            with self._survive():
                self._progress.stop()
            self._progress = None

    @contextlib.contextmanager
    def _survive(self) -> Any:
        try:
            yield
        except OSError:  # the terminal was closed, or the reader of a pipe: train on in silence
            self._gone, self._progress = True, None
            sys.stdout = open("/dev/null", "w")  # noqa: SIM115 (later prints and the flush at exit must not fail)

    def _time_left(self, step: int) -> str:
        (first, then), (last, now) = self._recent[0], self._recent[-1]
        return format_duration((now - then) / max(1, last - first) * (self._total - step))


def format_line(record: dict[str, Any], total: int, left: str) -> str:
    """`step  12/100  loss 5.4321  grad 1.23  lr 3.00e-04  12,345 tok/s  ...`, with what the record has."""
    parts = [f"step {record['step']:>{len(str(total))}}/{total}"]
    for key, text in (
        ("loss", "loss {:.4f}"),
        ("eval_loss", "eval {:.4f}"),
        ("recall", "recall {:z.1%}"),  # z: -0.0% is 0.0%
        ("grad_norm", "grad {:.3g}"),
        ("lr", "lr {:.2e}"),
        ("tokens_per_s", "{:,.0f} tok/s"),
    ):
        if record.get(key) is not None:
            parts.append(text.format(record[key]))
    if record.get("mfu") is not None:
        parts.append(f"mfu {record['mfu']:.1%}")
    if record.get("memory_mb") is not None:
        memory = record["memory_mb"]
        parts.append(f"{memory / 1024:.1f} GB" if memory >= 1024 else f"{memory:.0f} MB")
    if record.get("moe_max_violation"):
        parts.append(f"max violation {max(record['moe_max_violation']):.2f}")
    if record.get("data_wait_s") is not None:
        parts.append(f"data {record['data_wait_s'] * 1000:.0f} ms")
    if record.get("skipped"):
        parts.append("SKIPPED")
    return "  ".join([*parts, f"left {left}"])


def format_duration(seconds: float) -> str:
    """`45 s`, `12:34` or `3:05:00`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
