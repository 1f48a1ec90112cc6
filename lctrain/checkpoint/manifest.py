"""The list of a checkpoint's files with their hashes, written last: a folder without a valid one is not a checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lctrain.whole_file import write_json

NAME = "manifest.json"
FORMAT = 1
HASHING_THREADS = 8


def hash_files(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """`{name: {"bytes": size, "sha256": digest}}` of files, which are put on disk meanwhile."""
    paths = list(paths)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        sizes, digests = pool.map(_sync, paths), pool.map(_sha256, paths)
        return {path.name: {"bytes": size, "sha256": digest} for path, size, digest in zip(paths, sizes, digests, strict=True)}


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write `content` (step, meta, values, files, ...) as the manifest, with a hash of itself."""
    content = {"format": FORMAT, **content}
    write_json(folder / NAME, {**content, "sha256": _digest(content)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; ValueError with one line that says what is wrong with it."""
    try:
        content = json.loads((folder / NAME).read_bytes())
        digest = content.pop("sha256")
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing: the checkpoint was not finished") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{NAME} is damaged: it is not what was written") from None
    except OSError as error:
        raise ValueError(f"{NAME} cannot be read: {error.strerror}") from None
    if digest != _digest(content):
        raise ValueError(f"{NAME} is damaged: its content does not match its hash")
    if content["format"] != FORMAT:
        raise ValueError(f"{NAME} has format {content['format']}, this version reads {FORMAT}")
    return content


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one line per file; empty if every byte is as it was written."""
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return [str(error)]

    def problem(name: str) -> str | None:
        path, expected = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} is damaged: {size} bytes instead of {expected['bytes']}"
            return f"{name} is damaged: its content does not match its hash" if _sha256(path) != expected["sha256"] else None
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"

    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return [line for line in pool.map(problem, sorted(files)) if line]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> int:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size
