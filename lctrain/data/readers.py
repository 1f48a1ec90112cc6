"""Files to parts of documents, as a stream: no file is ever held whole.

By the file's ending (before .gz): .jsonl and .ndjson hold one document a line; .fa, .fna and .fasta one document a record;
any other file is one document. What is not JSON comes in parts of at most about 1 MB, cut at the end of a line or word where
there is one. A byte-level tokenizer gives the same ids however a document is cut; one with longer tokens may give a few other
ids at a cut, once per megabyte, which is the price of bounded memory. The cuts depend on the file alone.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

from lctrain.errors import UserError

PART = 1 << 20
"""Bytes of text that are tokenized at once."""

_BORDER = re.compile(rb"[ \t\n\r\f]")


class Part(NamedTuple):
    """Bytes of one document, or, with `line`, whole lines of JSON from that line on (counted from 1), a document each.

    ends: the document is complete with this part. read: bytes taken from the disk for it.
    """

    path: Path
    data: bytes
    ends: bool
    line: int = 0
    read: int = 0


def read_parts(path: Path) -> Iterator[Part]:
    """The documents of a file, part by part. UserError if it cannot be read or is not what its name says."""
    packed = path.suffix == ".gz"
    kind = path.with_suffix("").suffix if packed else path.suffix
    read = {".jsonl": _json_lines, ".ndjson": _json_lines, ".fa": _fasta, ".fna": _fasta, ".fasta": _fasta}.get(kind, _text)
    try:
        with path.open("rb") as raw, gzip.open(raw) if packed else contextlib.nullcontext(raw) as file:
            before = 0
            for part in read(path, file):
                yield part._replace(read=raw.tell() - before)
                before = raw.tell()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): leave it out or repair it") from None


def cut_text(data: bytes) -> tuple[bytes, bytes]:
    """About the first PART bytes, ending after a line, else after a word, else before a UTF-8 character; and the rest."""
    if len(data) <= PART:
        return data, b""
    end = data.rfind(b"\n", 0, PART) + 1
    if not end:
        end = max((match.end() for match in _BORDER.finditer(data, PART // 2, PART)), default=0)
    if not end:
        end = PART
        while end > PART - 4 and data[end] & 0xC0 == 0x80:
            end -= 1
    return data[:end], data[end:]


def _text(path: Path, file: BufferedIOBase) -> Iterator[Part]:
    kept = b""
    while block := file.read(PART):
        kept += block
        while len(kept) > PART:
            part, kept = cut_text(kept)
            yield Part(path, part, False)
    yield Part(path, kept, True)


def _json_lines(path: Path, file: BufferedIOBase) -> Iterator[Part]:
    kept, line = [], 1
    while block := file.read(PART):
        end = block.rfind(b"\n") + 1
        if not end:  # inside a line longer than a block
            kept.append(block)
            continue
        data = b"".join([*kept, block[:end]])
        yield Part(path, data, True, line)
        line += data.count(b"\n")
        kept = [block[end:]]
    if data := b"".join(kept):
        yield Part(path, data, True, line)


def _fasta(path: Path, file: BufferedIOBase) -> Iterator[Part]:
    """Records without their header lines and line breaks; the order of a record's bytes is all that is kept."""
    started = in_header = False
    while block := file.read(PART):
        if not started and block.lstrip()[:1] not in (b">", b""):
            raise UserError(f"{path} is not FASTA: it starts with {block.lstrip()[:20]!r} instead of '>'")
        while block:
            if in_header:
                _, found, block = block.partition(b"\n")
                in_header = not found
                continue
            sequence, found, block = block.partition(b">")
            in_header = bool(found)
            if data := sequence.translate(None, b" \t\r\n"):
                yield Part(path, data, False)
            if found and started:
                yield Part(path, b"", True)
            started = started or in_header
    yield Part(path, b"", True)
