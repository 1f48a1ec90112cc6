"""The two line files of a run: metrics.jsonl, one line per step, and events.jsonl, what happened and when."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lctrain.errors import UserError


class MetricsLog:
    """metrics.jsonl, with exactly one line per finished step whatever happened to the run.

    Lines of steps after `start_step` are dropped at the start: they belong to work that a crash has lost and that is now done
    again. So is a line that was torn when its writer was killed. UserError if the file cannot be written.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        with self._explained():
            if path.exists():
                kept = path.with_name(path.name + ".tmp")
                with open(kept, "w") as file:
                    file.writelines(_line(record) for record in read_lines(path) if record.get("step", 0) <= start_step)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(kept, path)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the life of the run)

    def step(self, record: dict[str, Any]) -> None:
        """Write one step; `record["step"]` counts finished steps, from 1 on. Numbers that are not finite become null."""
        line = _line(record).encode()
        with self._explained():
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}; free some space, then give the same command again"
            ) from error


def append_event(path: Path, kind: str, **fields: Any) -> None:
    """Add one line `{"time": ..., "kind": ..., ...}` to an event file that launcher and rank 0 share."""
    line = _line({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind, **fields})
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a writer was killed in the middle of its line
                line = "\n" + line
        file.write(line.encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of metrics.jsonl, in order of steps; empty if there is no file."""
    return sorted(read_lines(path), key=lambda record: record.get("step", 0))


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole records of events.jsonl, in the order in which they happened; empty if there is no file."""
    return list(read_lines(path))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a line file, without what a killed writer left torn."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and line.endswith(b"\n"):
                yield record


def _line(record: dict[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Something JSON can hold: tensors and numpy scalars become numbers, what is not finite becomes null."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
