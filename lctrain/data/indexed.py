"""Megatron-LM's `.bin/.idx` corpora: a memory-mapped reader and a streaming writer.

<prefix>.bin holds the token ids of all documents, one after the other. <prefix>.idx holds, little-endian:
  9 bytes  "MMIDIDX\\0\\0", uint64 version (1), uint8 code of the token dtype,
  uint64   number of sequences s, uint64 number of document borders d+1,
  int32[s] tokens of each sequence, int64[s] byte at which each starts, int64[d+1] first sequence of each document.
Source: megatron-core 0.16, megatron/core/datasets/indexed_dataset.py. A document is usually one sequence; one longer than
a 32-bit length can say is written as several.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lctrain.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_MAX_SEQUENCE = 2**31 - 1
_SLAB = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest dtype that megatron-core reads and that holds all ids below vocab_size (65,500 is Megatron's own limit)."""
    return np.dtype(np.uint8 if vocab_size <= 256 else np.uint16 if vocab_size < 65_500 else np.int32)


def corpus_exists(prefix: str) -> bool:
    """Whether a finished corpus lies at `prefix`. The index is put in place last, so its presence means all is there."""
    return os.path.exists(f"{prefix}.idx") and os.path.exists(f"{prefix}.bin")


class IndexedDataset:
    """Read access to the documents of <prefix>.bin/.idx.

    lengths: int64 [documents], tokens of each; starts: int64 [documents], token at which each begins in the .bin.
    Raises UserError if a file is missing, is no such file, or the two do not fit together.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        if not corpus_exists(prefix):
            raise UserError(
                f"corpus {prefix} does not exist ({prefix}.bin and {prefix}.idx are needed):"
                f" write it with `lctrain data prepare input=<files> output={prefix}`"
            )
        self.dtype, sequence_lengths, pointers, borders = _read_index(Path(f"{prefix}.idx"))
        ends = np.concatenate([[0], np.cumsum(sequence_lengths, dtype=np.int64)])
        size = os.path.getsize(f"{prefix}.bin")
        last = int(pointers[-1]) + int(sequence_lengths[-1]) * self.dtype.itemsize if len(pointers) else 0
        if not size == last == int(ends[-1]) * self.dtype.itemsize:
            raise UserError(
                f"corpus {prefix} is damaged: its index describes {int(ends[-1]) * self.dtype.itemsize} bytes in one run but"
                f" {prefix}.bin has {size}; prepare it again"
            )
        self.starts = ends[borders[:-1]]
        self.lengths = ends[borders[1:]] - self.starts
        # A plain array over the map: slicing numpy.memmap itself costs microseconds per document.
        self._tokens = np.asarray(np.memmap(f"{prefix}.bin", self.dtype, mode="r")) if size else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return len(self._tokens)

    def document(self, number: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start .. stop-1 of one document, as a view of the file in its own dtype."""
        first, length = int(self.starts[number]), int(self.lengths[number])
        stop = length if stop is None else min(stop, length)
        return self._tokens[first + start : first + stop]

    def max_id(self) -> int:
        """Largest token id, found by reading the whole file in pieces; -1 for an empty corpus."""
        return max((int(self._tokens[i : i + _SLAB].max()) for i in range(0, self.tokens, _SLAB)), default=-1)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    magic, version, code, sequences, borders = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    if magic != _MAGIC or version != 1 or code not in _DTYPES or not borders:
        raise UserError(f"{path} is not a Megatron index of integer tokens (version 1): prepare the corpus again")
    if path.stat().st_size < _HEADER.size + 12 * sequences + 8 * borders:
        raise UserError(f"{path} is cut short: it announces {sequences} sequences; copy or prepare the corpus again")
    data = np.memmap(path, np.uint8, mode="r", offset=0)
    at = _HEADER.size
    lengths = np.frombuffer(data, "<i4", sequences, at)
    pointers = np.frombuffer(data, "<i8", sequences, at + 4 * sequences)
    documents = np.frombuffer(data, "<i8", borders, at + 12 * sequences)
    return np.dtype(_DTYPES[code]), lengths, pointers, documents


class IndexedWriter:
    """Writes a corpus document by document, each in as many parts as it comes.

    Memory: four bytes per document. Everything goes to <prefix>.*.partial; `finish` puts it in place, and leaving the
    `with` block without it removes what was written.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = token_dtype(vocab_size)
        self.tokens = 0
        self.max_id = -1
        self._hash = hashlib.sha256()
        self._sequences = array.array("i")
        self._borders = array.array("q", [0])
        self._open_tokens = 0
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._partial("bin"), "wb")  # noqa: SIM115 (closed by finish or __exit__)

    @property
    def documents(self) -> int:
        """Finished documents."""
        return len(self._borders) - 1

    @property
    def sha256(self) -> str:
        """Hash of the token file as written so far."""
        return self._hash.hexdigest()

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens [n] to the document that is being written."""
        if not len(tokens):
            return
        data = np.ascontiguousarray(tokens, dtype=self.dtype)
        self.max_id = max(self.max_id, int(data.max()))
        self._bin.write(data.data)
        self._hash.update(data.data)
        self.tokens += len(data)
        self._open_tokens += len(data)

    def end_document(self) -> None:
        """Close the document that is being written; an empty one is kept as such."""
        left = self._open_tokens
        while left > _MAX_SEQUENCE:
            self._sequences.append(_MAX_SEQUENCE)
            left -= _MAX_SEQUENCE
        self._sequences.append(left)
        self._borders.append(len(self._sequences))
        self._open_tokens = 0

    def finish(self, sidecar: str) -> None:
        """Write the index and the text of <prefix>.json, and give all three files their names."""
        assert self._open_tokens == 0, "finish() inside a document"
        self._write_index()
        Path(self._partial("json")).write_text(sidecar)
        _sync(self._bin)
        self._bin.close()
        # The index goes first and comes last: whoever sees it sees the files that belong to it.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for ending in ("bin", "json", "idx"):
            os.replace(self._partial(ending), f"{self.prefix}.{ending}")

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # on a full disk, closing tries once more to write what did not fit
            self._bin.close()
        for ending in ("bin", "json", "idx"):
            Path(self._partial(ending)).unlink(missing_ok=True)

    def _partial(self, ending: str) -> str:
        return f"{self.prefix}.{ending}.partial"

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._sequences, np.int32) if self._sequences else np.empty(0, np.int32)
        code = next(code for code, dtype in _DTYPES.items() if self.dtype == dtype)
        with open(self._partial("idx"), "wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(self._borders)))
            file.write(lengths.tobytes())
            position = 0
            for start in range(0, len(lengths), _SLAB):
                ends = position + np.cumsum(lengths[start : start + _SLAB], dtype=np.int64) * self.dtype.itemsize
                file.write(np.concatenate([[position], ends[:-1]]).astype(np.int64).tobytes())
                position = int(ends[-1])
            file.write(self._borders.tobytes())
            _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
