"""Which files an input means: a file, a folder, a glob or `python:`."""

from __future__ import annotations

import glob
import gzip
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from lctrain.errors import UserError

_PYTHON_TEXT = (".py", ".pyi", ".txt", ".rst", ".md", ".html")
_PYTHON_SKIP = ("site-packages", "dist-packages", "lib-dynload", "ensurepip")
_SNIFF = 8192


def find_files(inputs: Iterable[str]) -> list[Path]:
    """All files that the inputs mean, in the order of the inputs and sorted within each; a file named twice comes once.

    In a folder, hidden files, __pycache__ and what does not look like text are left out; a file or glob is taken as it is.
    Raises UserError for an input that means no file.
    """
    found: dict[Path, Path] = {}
    for name in inputs:
        files = list(_expand(name))
        if not files:
            raise UserError(f"input {name!r} holds no text file: name a file, a folder with text below it, or a glob")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _expand(name: str) -> Iterator[Path]:
    if name == "python:":
        yield from _python_files()
        return
    path = Path(name).expanduser()
    matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not matches:
        raise UserError(f"input {name!r} does not exist and matches no file")
    for match in matches:
        if match.is_dir():
            yield from (file for file in _below(match) if _looks_like_text(file))
        elif match.is_file():
            yield match


def _python_files() -> Iterator[Path]:
    """Sources and text documentation of the running interpreter, without what is installed on top of it."""
    paths = sysconfig.get_paths()
    library = Path(paths["stdlib"])
    folders = [library, *sorted((library.parents[1] / "share" / "doc").glob("python3*"))]
    for folder in folders:
        for file in _below(folder):
            inside = file.relative_to(folder).parts[:-1]
            if file.suffix in _PYTHON_TEXT and not set(inside) & set(_PYTHON_SKIP) and _looks_like_text(file):
                yield file


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith(".") and Path(parent, name).is_file())


def _looks_like_text(file: Path) -> bool:
    """No zero bytes and next to no broken UTF-8 or control characters at the beginning (unpacked, if it is a .gz)."""
    try:
        with file.open("rb") as raw:
            head = gzip.GzipFile(fileobj=raw).read(_SNIFF) if file.suffix == ".gz" else raw.read(_SNIFF)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return False
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): leave it out or change its permissions") from None
    text = head.decode("utf-8", errors="replace")
    odd = sum(char == "\ufffd" or (char < " " and char not in "\t\n\r\f\x1b") for char in text)
    return b"\0" not in head and odd * 50 <= len(text)
