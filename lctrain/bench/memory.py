"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import contextlib
import ctypes
import re
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_mib() -> float:
    """Resident now, MiB."""
    return _field("VmRSS")


def peak_resident_mib() -> float:
    """Most resident since the start of the process or `forget_peak`, MiB.

    Not getrusage's ru_maxrss: a child inherits that from the process that started it.
    """
    return _field("VmHWM")


def forget_peak() -> None:
    """Start a new count of the peak at what is in use now."""
    with contextlib.suppress(AttributeError):  # without glibc
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would be used again unnoticed
    Path("/proc/self/clear_refs").write_text("5")


def _field(name: str) -> float:
    match = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024
