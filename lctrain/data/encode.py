"""Parts of documents to token ids, in parallel and in the order of the files."""

from __future__ import annotations

import collections
import concurrent.futures
import ctypes
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from lctrain.data.readers import PART, Part, cut_text
from lctrain.data.tokenizers import Tokenizer
from lctrain.errors import UserError

_AHEAD = 3
"""Batches per worker that are under way at once; bounds the memory."""


class Encoded(NamedTuple):
    """Token ids of a batch, and the places in it at which a document is complete (int64, ascending, may repeat)."""

    tokens: np.ndarray
    ends: np.ndarray


class Encoder:
    """Tokenizes batches of parts. UserError, with file and line, for what is not what its name says."""

    def __init__(self, tokenizer: Tokenizer, text_key: str) -> None:
        self._tokenizer = tokenizer
        self._text_key = text_key

    def __call__(self, batch: list[Part]) -> Encoded:
        ids, ends, total = [], [], 0
        for part in batch:
            for text, complete in self._documents(part):
                for piece in _pieces(text):
                    ids.append(self._encode(part, piece))
                    total += len(ids[-1])
                if complete:
                    ends.append(total)
        empty = self._tokenizer.encode(b"")
        return Encoded(np.concatenate([empty, *ids]), np.array(ends, np.int64))

    def _encode(self, part: Part, text: bytes) -> np.ndarray:
        try:
            return self._tokenizer.encode(text)
        except UserError as error:
            raise UserError(f"{part.path}: {error}") from None

    def _documents(self, part: Part) -> Iterator[tuple[bytes, bool]]:
        if not part.line:
            yield part.data, part.ends
            return
        for number, line in enumerate(part.data.split(b"\n"), part.line):
            if line.strip():
                yield self._json_text(line, f"{part.path}, line {number}"), True

    def _json_text(self, line: bytes, where: str) -> bytes:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(record, dict) or not isinstance(text := record.get(self._text_key), str):
            keys = f"its keys are {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no JSON object"
            raise UserError(f"{where}: no text under the key {self._text_key!r} ({keys}); set text_key=<key>")
        return text.encode("utf-8", errors="replace")


def batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Parts in groups of about PART bytes, so that small files do not cost a message each."""
    group, size = [], 0
    for part in parts:
        group.append(part)
        size += len(part.data) + 64
        if size >= PART:
            yield group
            group, size = [], 0
    if group:
        yield group


class EncoderPool:
    """`workers` processes that encode; with one worker, this process does it."""

    def __init__(self, encoder: Encoder, workers: int) -> None:
        self._encoder = encoder
        self._executor = None
        self._ahead = _AHEAD * workers
        if workers > 1:
            context = multiprocessing.get_context("fork")
            self._executor = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (encoder, os.getpid()))
            # Start them now: later this process may have threads, and a fork with threads may inherit a held lock.
            self._executor.submit(int).result()

    def map(self, groups: Iterable[list[Part]]) -> Iterator[tuple[list[Part], Encoded]]:
        """Every group with its token ids, in order, with a bounded number of groups under way."""
        if self._executor is None:
            yield from ((group, self._encoder(group)) for group in groups)
            return
        waiting: collections.deque[tuple[list[Part], concurrent.futures.Future[Encoded]]] = collections.deque()
        groups = iter(groups)
        try:
            for group in itertools.islice(groups, self._ahead):
                waiting.append((group, self._executor.submit(_encode_in_worker, group)))
            while waiting:
                group, future = waiting.popleft()
                encoded = future.result()
                for following in itertools.islice(groups, 1):
                    waiting.append((following, self._executor.submit(_encode_in_worker, following)))
                yield group, encoded
        except BrokenProcessPool:
            raise UserError("a process that tokenizes was killed (out of memory?): try again with fewer workers=") from None

    def close(self) -> None:
        """End the processes."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def encoder_pool(encoder: Encoder, workers: int) -> Iterator[EncoderPool]:
    """An EncoderPool that is closed at the end of the block."""
    pool = EncoderPool(encoder, workers)
    try:
        yield pool
    finally:
        pool.close()


def _pieces(text: bytes) -> Iterator[bytes]:
    while text:
        piece, text = cut_text(text)
        yield piece


_worker: Encoder | None = None


def _start_worker(encoder: Encoder, parent: int) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a worker would only print a trace
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: a killed parent leaves no process behind
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism is one process per core already
    _worker = encoder


def _encode_in_worker(batch: list[Part]) -> Encoded:
    assert _worker is not None
    return _worker(batch)
