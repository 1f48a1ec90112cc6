"""Files that are either there as a whole or not there, also after a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lctrain.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file with this text, on disk before it is visible."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of an indented JSON document."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def check_output(setting: str, value: str | None) -> None:
    """UserError now rather than after an hour of work, if a file that the user has asked for could not be written."""
    if value is None:
        return
    path = Path(value)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{setting}={value}: not a file in an existing folder that can be written to")


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk; fsync of a file alone does not keep its name."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
