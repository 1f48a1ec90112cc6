"""Small corpora and configs for the tests of lctrain.data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lctrain.config.schema import CorpusConfig, DataConfig, StageConfig, TrainerConfig
from lctrain.data.indexed import IndexedWriter
from lctrain.data.sidecar import Sidecar

BIG_VOCAB = 1 << 20
"""Room for corpora whose every token has an id of its own."""


def write_corpus(prefix: Path, lengths: Sequence[int], first_id: int = 0, sidecar: bool = True) -> str:
    """A corpus of documents of the given lengths whose tokens count up from first_id: a token's id is its place."""
    with IndexedWriter(str(prefix), BIG_VOCAB) as writer:
        at = first_id
        for length in lengths:
            writer.append(np.arange(at, at + length))
            writer.end_document()
            at += length
        description = Sidecar(
            "bytes", "bytes", 256, 257, len(lengths), writer.tokens, writer.max_id, 0, writer.sha256, ("test",), "0"
        )
        writer.finish(description.to_json())
    if not sidecar:
        Path(f"{prefix}.json").unlink()
    return str(prefix)


def data_config(*corpora: str, weights: Sequence[float] | None = None, **fields) -> DataConfig:
    """Settings for corpora at the given prefixes, nothing held out unless asked for."""
    weights = weights or [1.0] * len(corpora)
    entries = tuple(CorpusConfig(prefix=prefix, weight=weight) for prefix, weight in zip(corpora, weights, strict=True))
    return DataConfig(corpora=entries, **{"valid_fraction": 0.0, "shuffle_window": 8, **fields})


def trainer_config(seq_len: int, stages: Sequence[tuple[int, int]] = (), **fields) -> TrainerConfig:
    """Trainer settings; stages as (steps, seq_len)."""
    staged = tuple(StageConfig(steps=steps, seq_len=length) for steps, length in stages)
    return TrainerConfig(seq_len=seq_len, stages=staged, **{"global_batch": 4, "steps": 100, **fields})
