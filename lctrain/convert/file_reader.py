"""Bytes of files, from any place on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from lctrain.errors import UserError


class FileReader:
    """Reads from any number of files, of which it keeps the last one open: tensors that are neighbours share a file."""

    def __init__(self) -> None:
        self._open: tuple[Path, IO[bytes]] | None = None

    def descriptor(self, path: Path) -> int:
        """Of the open file, valid until another one is read. OSError if it cannot be opened."""
        if self._open is None or self._open[0] != path:
            file = open(path, "rb", buffering=0)  # noqa: SIM115
            if self._open is not None:
                self._open[1].close()
            self._open = (path, file)
        return self._open[1].fileno()

    def fill(self, buffer: memoryview, path: Path, start: int, name: str) -> None:
        """Fill a buffer of bytes with those from `start` on; UserError that names the tensor if the file ends before."""
        while len(buffer):  # a single read ends at 2 GB
            count = os.preadv(self.descriptor(path), [buffer], start)
            if not count:
                raise UserError(f"{path} has ended within {name}: it is damaged")
            buffer, start = buffer[count:], start + count
