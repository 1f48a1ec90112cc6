"""The code that a batch job runs: a copy of the installed package, which later edits do not reach."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lctrain
from lctrain.environment import SNAPSHOT_NOTE, git_diff, git_state
from lctrain.whole_file import write_json


def copy_code(folder: Path) -> None:
    """Copy the running lctrain package into `folder`, uncommitted changes included, with a note of its git state.

    A copy of the package, not an archive of a commit: it is the code that was just seen to accept the settings, it exists
    where lctrain was installed without git, and it is small (about 2 MB). Links of a clone (lctrain/kernels) become folders.
    """
    source = Path(lctrain.__file__).resolve().parent
    shutil.copytree(source, folder / "lctrain", ignore=_left_out)
    write_json(folder / SNAPSHOT_NOTE, {**git_state(), "git_diff": git_diff()})


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Caches, hidden files, and files that cannot be read, such as an editor's locks."""
    return {
        name
        for name in names
        if name == "__pycache__" or name.startswith(".") or not os.access(os.path.join(folder, name), os.R_OK)
    }
