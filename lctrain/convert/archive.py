"""Archives of torch.save that are read and written piece by piece: where in a file a tensor's numbers begin.

torch writes and reads such an archive whole, through copies of every tensor. Its `skip_data` leaves out the numbers and tells
the place that they belong to, so that they can be moved by plain reads and writes of any size.
"""

from __future__ import annotations

import io
import os
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.serialization import skip_data

NUMBERS = "data/0"
"""The record of an archive's first storage."""


class _Window(io.RawIOBase):
    """Bytes start .. start + length of an open file, as a file of its own."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any file."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        """As of any file."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As of any file."""
        room = memoryview(buffer).cast("B")
        count = os.preadv(self._descriptor, [room[: max(0, self._length - self._at)]], self._start + self._at)
        self._at += count
        return count


def window(descriptor: int, start: int, length: int) -> IO[bytes]:
    """A part of an open file as a file of its own, for reading."""
    return cast("IO[bytes]", _Window(descriptor, start, length))


def stored_at(descriptor: int, start: int, length: int) -> tuple[Tensor, int]:
    """The tensor of an archive that lies at this place in a file, without its numbers, and where its storage begins."""
    with skip_data():
        tensor = torch.load(window(descriptor, start, length), map_location="cpu", weights_only=True)
    assert isinstance(tensor, Tensor), type(tensor)
    return tensor.detach(), start + _numbers(descriptor, start, length)


def save_without_numbers(value: Any, file: IO[bytes]) -> int:
    """Append torch.save's archive of a value with one tensor, whose numbers are left out; returns where they belong.

    file: opened for reading and writing, unbuffered. The tensor must be whole: contiguous and no view.
    """
    start = file.tell()
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # nobody compares them, and there is nothing yet to make them of
    try:
        with skip_data():
            torch.save(value, file)
    finally:
        torch.serialization.set_crc32_options(checksums)
    return start + _numbers(file.fileno(), start, file.tell() - start)


def _numbers(descriptor: int, start: int, length: int) -> int:
    reader: Any = torch._C.PyTorchFileReader(window(descriptor, start, length))
    return int(reader.get_record_offset(NUMBERS))


def write_at(descriptor: int, data: memoryview, at: int) -> None:
    """All of it, to a place in a file."""
    while len(data):  # a single write ends at 2 GB
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count


def bytes_of(block: Tensor) -> memoryview:
    """A tensor's numbers."""
    return block.contiguous().view(-1).view(torch.uint8).numpy().data
