"""What a colleague needs to know about where a run ran: versions, machine, command and the state of the source."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("lctrain", "torch", "numpy", "triton", "hydra-core", "pydantic", "tokenizers", "transformers", "wandb")
_SOURCE = Path(__file__).resolve().parent.parent
SNAPSHOT_NOTE = "source.json"
"""Beside a copy of the package that a batch job runs: the git state of the clone that it was copied from."""


def describe_environment() -> dict[str, Any]:
    """Plain values for environment.json; does not initialise CUDA, so that the caller can still fork."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "command": sys.orig_argv,
        "folder": os.getcwd(),
        "python": sys.version.split()[0],
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": _gpu_names(),
        **git_state(),
    }


def git_state() -> dict[str, Any]:
    """Commit of lctrain's own clone and whether it has changes; None and False if it is not a clone."""
    if note := _snapshot_note():
        return {key: note[key] for key in ("git_commit", "git_dirty")}
    return {"git_commit": _git("rev-parse", "HEAD"), "git_dirty": bool(_git("status", "--porcelain"))}


def git_diff() -> str:
    """Uncommitted changes of tracked files in lctrain's own clone; empty if there are none or it is not a clone."""
    if note := _snapshot_note():
        return str(note["git_diff"])
    return _git("diff", "HEAD", strip=False) or ""


def _snapshot_note() -> dict[str, Any]:
    try:
        note: dict[str, Any] = json.loads((_SOURCE / SNAPSHOT_NOTE).read_text())
    except (OSError, ValueError):
        return {}
    return note


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_names() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()


def _git(*arguments: str, strip: bool = True) -> str | None:
    # Only a clone of lctrain itself: an installed copy may lie inside the repository of something else.
    if not (_SOURCE / ".git").exists() or not shutil.which("git"):
        return None
    text = _output("git", "--no-optional-locks", "-C", str(_SOURCE), *arguments)
    return text.strip() if text and strip else text


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
