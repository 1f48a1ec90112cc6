"""Where a setting came from: the argument as it was typed, or the YAML file that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lctrain.config.compose import ConfigFile
from lctrain.config.overrides import Assignment


def source_of(path: Sequence[str], assignments: Sequence[Assignment], files: Sequence[ConfigFile]) -> str | None:
    """The last argument that wrote `path`, else the last file that has it, else None (it is a default)."""
    path = tuple(path)
    for written in reversed(assignments):
        shared = min(len(path), len(written.path))
        if not written.delete and written.path[:shared] == path[:shared]:
            return f"argument {written.text}"
    for file in reversed(files):
        if path[: len(file.package)] == file.package and _has(file.content, path[len(file.package) :]):
            return file.name
    return None


def _has(content: Any, path: Sequence[str]) -> bool:
    for name in path:
        if isinstance(content, list) and name.isdecimal() and int(name) < len(content):
            content = content[int(name)]
        elif isinstance(content, dict) and name in {str(key) for key in content}:
            content = next(value for key, value in content.items() if str(key) == name)
        else:
            return False
    return True
