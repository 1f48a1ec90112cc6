"""What is in a corpus, for people."""

from __future__ import annotations

import numpy as np

from lctrain.data.indexed import IndexedDataset
from lctrain.data.sidecar import read_sidecar
from lctrain.data.tokenizers import load_tokenizer
from lctrain.errors import UserError

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
_LONG = (1024, 4096, 16384, 65536)


def describe_corpus(prefix: str) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """Rows of two tables: facts (name, value), and for some lengths how many documents are longer and their token share."""
    dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
    lengths = dataset.lengths
    facts = [("documents", f"{len(dataset):,}"), ("tokens", f"{dataset.tokens:,}"), ("stored as", str(dataset.dtype))]
    if sidecar is not None:
        facts += [
            ("tokenizer", sidecar.tokenizer),
            ("vocabulary", f"{sidecar.vocab_size:,}"),
            ("end of document", str(sidecar.eod)),
            ("largest id", str(sidecar.max_id)),
            ("made from", ", ".join(sidecar.sources)),
            ("sha256 of .bin", sidecar.sha256),
        ]
    else:
        facts.append(("tokenizer", f"unknown: there is no {prefix}.json"))
    if len(lengths):
        names = ("shortest", "quarter", "median", "three quarters", "95 %", "longest")
        values = np.quantile(lengths, _QUANTILES, method="lower")
        facts += [(f"tokens, {name}", f"{int(value):,}") for name, value in zip(names, values, strict=True)]
    rows = []
    for long in _LONG:
        share = lengths[lengths > long].sum() / max(1, dataset.tokens)
        rows.append((f"{long:,}", f"{int((lengths > long).sum()):,}", f"{share:.1%}"))
    return facts, rows


def document_text(prefix: str, number: int, start: int = 0, tokens: int | None = None, tokenizer: str | None = None) -> str:
    """Text of `tokens` tokens of a document from its token `start` on (None: to its end)."""
    dataset, sidecar = IndexedDataset(prefix), read_sidecar(prefix)
    if number >= len(dataset):
        raise UserError(f"document={number}: corpus {prefix} has {len(dataset)} documents, numbered from 0")
    if tokenizer is None:
        if sidecar is None:
            raise UserError(f"there is no {prefix}.json that names the tokenizer: add tokenizer=<bytes, dna or path>")
        tokenizer = sidecar.tokenizer
    ids = dataset.document(number, start, None if tokens is None else start + tokens)
    return load_tokenizer(tokenizer).decode(ids.astype(np.int64))
