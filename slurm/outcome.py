"""The word that a job's processes leave for its batch script about how they ended: one small file per start of the job."""

from __future__ import annotations

import os
from pathlib import Path


def write_outcome(path: Path, word: str) -> None:
    """Set the word; the script sees the old one or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(word + "\n")
    temporary.replace(path)


def claim_outcome(path: Path, word: str) -> bool:
    """Set the word if there is none yet; True for the one process that did, and that may speak for all."""
    try:
        with open(path, "x") as file:
            file.write(word + "\n")
    except FileExistsError:
        return False
    return True
