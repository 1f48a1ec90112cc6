"""Corpora from files, and the corpora of a run: prepared if need be, and fit for its model."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

import lctrain
from lctrain.config.schema import CorpusConfig, DataConfig
from lctrain.console import progress, say
from lctrain.data.encode import Encoder, EncoderPool, batches, encoder_pool
from lctrain.data.indexed import IndexedDataset, IndexedWriter, corpus_exists, token_dtype
from lctrain.data.inputs import find_files
from lctrain.data.readers import read_parts
from lctrain.data.sidecar import Sidecar, read_sidecar
from lctrain.data.tokenizers import Tokenizer, load_tokenizer
from lctrain.errors import UserError


def prepare(
    inputs: Sequence[str],
    output: str,
    tokenizer: str = "bytes",
    workers: int | None = None,
    text_key: str = "text",
    overwrite: bool = False,
) -> Sidecar:
    """Tokenize files into the corpus <output>.bin/.idx/.json; every document ends with the end-of-document token.

    The files are byte for byte the same for any number of workers (default: one per core). Memory stays bounded: a few
    megabytes per worker, four bytes per document, and the longest line of a JSONL file. Empty documents are left out.
    Either the whole corpus appears or nothing does. Raises UserError for whatever the user can correct.
    """
    loaded = load_tokenizer(tokenizer)
    with _locked(output):
        if corpus_exists(output) and not overwrite:
            raise UserError(f"corpus {output} exists already: choose another output=, or replace it with overwrite=true")
        return _prepare(inputs, output, loaded, workers or _cores(), text_key)


def ensure_corpora(data: DataConfig, vocab_size: int) -> None:
    """Prepare every corpus that does not exist and has a source, and check that all of them suit the run.

    For the launcher, once, before any rank starts. Safe if several runs do it at once: one prepares, the others wait.
    Raises UserError for a corpus that is missing, empty, damaged, of another tokenizer, or has ids >= vocab_size.
    """
    tokenizer = load_tokenizer(data.tokenizer)
    for corpus in data.corpora:
        if not corpus_exists(corpus.prefix):
            _prepare_missing(corpus, tokenizer)
        _check(corpus.prefix, tokenizer, vocab_size)


def _prepare_missing(corpus: CorpusConfig, tokenizer: Tokenizer) -> None:
    if corpus.source is None:
        raise UserError(
            f"corpus {corpus.prefix} does not exist: run lctrain data prepare input=<files> output={corpus.prefix}"
            f" tokenizer={tokenizer.name}"
        )
    with _locked(corpus.prefix):
        if corpus_exists(corpus.prefix):  # another run was faster
            return
        say(f"preparing corpus {corpus.prefix} from {', '.join(corpus.source)}")
        _prepare(corpus.source, corpus.prefix, tokenizer, _cores(), "text")


def _check(prefix: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
    if not dataset.tokens:
        raise UserError(f"corpus {prefix} has no tokens: prepare it from files that have text")
    if sidecar is not None and sidecar.tokens != dataset.tokens:
        raise UserError(f"{prefix}.json speaks of {sidecar.tokens} tokens, {prefix}.bin has {dataset.tokens}: prepare it again")
    if sidecar is not None and sidecar.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"corpus {prefix} was prepared with tokenizer {sidecar.tokenizer}, but data.tokenizer={tokenizer.name}"
            f" ({sidecar.fingerprint} against {tokenizer.fingerprint}): set data.tokenizer, or prepare the corpus again"
        )
    largest = sidecar.max_id if sidecar is not None else dataset.max_id()
    if largest >= vocab_size:
        raise UserError(
            f"corpus {prefix} has token ids up to {largest}, but model.vocab_size={vocab_size}:"
            f" set model.vocab_size={max(largest + 1, tokenizer.vocab_size)}"
        )


def _prepare(inputs: Sequence[str], output: str, tokenizer: Tokenizer, workers: int, text_key: str) -> Sidecar:
    own = {Path(f"{output}.{ending}").resolve() for ending in ("bin", "idx", "json", "lock")}
    files = [file for file in find_files(inputs) if file.resolve() not in own]
    _check_space(output, files, tokenizer)
    encoder = Encoder(tokenizer, text_key)
    try:
        with IndexedWriter(output, tokenizer.vocab_size) as writer, encoder_pool(encoder, workers) as pool:
            skipped = _write(files, pool, writer, tokenizer.eod)
            if not writer.documents:
                raise UserError(f"input {', '.join(map(repr, inputs))} has no text: {len(files)} files, all empty")
            sidecar = Sidecar(
                tokenizer=tokenizer.name,
                fingerprint=tokenizer.fingerprint,
                eod=tokenizer.eod,
                vocab_size=tokenizer.vocab_size,
                documents=writer.documents,
                tokens=writer.tokens,
                max_id=writer.max_id,
                skipped=skipped,
                sha256=writer.sha256,
                sources=tuple(inputs),
                lctrain=lctrain.__version__,
            )
            writer.finish(sidecar.to_json())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"output={output} could not be written to its end ({error.strerror}): free some space or choose another disk"
            ) from None
        raise
    return sidecar


def _write(files: Sequence[Path], pool: EncoderPool, writer: IndexedWriter, eod: int) -> int:
    """Write all documents and return how many were empty and left out."""
    skipped = 0
    begun = 0  # tokens in the corpus when the current document began
    with progress(f"preparing {writer.prefix}", sum(file.stat().st_size for file in files), "B") as advance:
        for group, encoded in pool.map(batches(part for file in files for part in read_parts(file))):
            done = 0
            for end in encoded.ends.tolist():
                writer.append(encoded.tokens[done:end])
                done = end
                if writer.tokens == begun:
                    skipped += 1
                    continue
                writer.append(np.array([eod]))
                writer.end_document()
                begun = writer.tokens
            writer.append(encoded.tokens[done:])
            advance(sum(part.read for part in group))
    return skipped


def _check_space(output: str, files: Sequence[Path], tokenizer: Tokenizer) -> None:
    text = sum(file.stat().st_size * (4 if file.suffix == ".gz" else 1) for file in files)
    characters = 1 if tokenizer.fingerprint in ("bytes", "dna") else 3  # per token, roughly
    needed = text * token_dtype(tokenizer.vocab_size).itemsize // characters
    free = shutil.disk_usage(Path(output).absolute().parent).free
    if needed > free:
        raise UserError(
            f"output={output} needs about {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free:"
            " free some space or choose another disk"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _locked(prefix: str) -> Iterator[None]:
    """Only one process at a time prepares a corpus; the lock goes with its process, however that ends."""
    path = Path(f"{prefix}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except OSError as error:
        raise UserError(f"output={prefix} cannot be written ({error.strerror}): choose another path") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _lock(path: Path) -> TextIO:
    while True:
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that prepares {path.with_suffix('')}")
            fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever held it has removed the file: the lock we got is on a file that nobody else will find.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()
