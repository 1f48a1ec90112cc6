"""The folder of checkpoints as rank 0 keeps it: names, replacement, retention, and what a crash has left.

`step-00000123` is a checkpoint. `tmp-*` is one being written or deleted; after a crash it is rubbish. `old-step-00000123-*` is
the one that a newer save of the same step is about to replace; after a crash between the two renames it is still needed.
`abandoned-step-00000300-*` belonged to a future that the run has left by resuming from an earlier checkpoint.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from lctrain.checkpoint.manifest import NAME as MANIFEST
from lctrain.whole_file import sync_folder

_CHECKPOINT = re.compile(r"(?:old-)?step-(\d+)(?:-[0-9a-f]+)?")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def temporary_name(name: str, prefix: str = "tmp-") -> str:
    """A fresh name for a folder that is not, or no longer, the checkpoint `name`."""
    return f"{prefix}{name}-{secrets.token_hex(4)}"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint, damaged ones included, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, key=lambda item: (item[0], item[1].name.startswith("step-")))


def clean(folder: Path) -> None:
    """Remove what earlier runs were writing or deleting when they were killed."""
    for path in folder.glob("old-*"):
        match = _CHECKPOINT.fullmatch(path.name)
        if match and not (final := folder / checkpoint_name(int(match[1]))).exists():
            path.rename(final)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Make a finished checkpoint visible under its name, in place of an earlier one of the same step."""
    old = final.with_name(temporary_name(final.name, "old-")) if final.exists() else None
    if old:
        final.rename(old)
    temporary.rename(final)
    sync_folder(final.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def retain(folder: Path, step: int, keep_last: int, keep_every: int | None) -> list[Path]:
    """Delete what need not be kept after `step` was saved; returns checkpoints of later steps, which are set aside.

    Those later ones are damaged, or belong to a future that was abandoned by resuming from an earlier step. Left in place, they
    would be taken for the run's newest.
    """
    earlier = [(at, path) for at, path in checkpoints(folder) if at <= step]
    complete = {at for at, path in earlier if (path / MANIFEST).exists()}
    kept = {*sorted(complete)[-keep_last:], *(at for at in complete if keep_every and at % keep_every == 0)}
    for at, path in earlier:
        if at not in kept:
            doomed = folder / temporary_name(path.name)
            path.rename(doomed)  # so that a half-deleted folder is never taken for a checkpoint
            shutil.rmtree(doomed)
    aside = []
    for at, path in checkpoints(folder):
        if at > step:
            aside.append(path.rename(folder / temporary_name(checkpoint_name(at), "abandoned-")))
    return aside


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the file system of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize
