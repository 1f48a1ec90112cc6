"""Small corpora and settings for the tests of lctrain.data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lctrain.config.schema import CorpusConfig, DataConfig, StageConfig, TrainerConfig
from lctrain.data.indexed import IndexedWriter
from lctrain.data.samples import SampleSource
from lctrain.data.sidecar import Sidecar

BIG_VOCAB = 1 << 20
"""Room for corpora whose every token has an id of its own."""


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., str]:
    """corpus(lengths, name): prefix of a corpus of such documents whose tokens count up, so that an id tells its place."""

    def write(lengths: Sequence[int], name: str = "c", first_id: int = 0, vocab: int = BIG_VOCAB, sidecar: bool = True) -> str:
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, vocab) as writer:
            at = first_id
            for length in lengths:
                writer.append(np.arange(at, at + length))
                writer.end_document()
                at += length
            facts = (256, 257, writer.documents, writer.tokens, writer.max_id, 0, writer.sha256, ("test",), "0")
            writer.finish(Sidecar("bytes", "bytes", *facts).to_json())
        if not sidecar:
            Path(f"{prefix}.json").unlink()
        return prefix

    return write


@pytest.fixture
def data_config() -> Callable[..., DataConfig]:
    """data_config(prefix, ...): nothing is held out unless asked for."""

    def make(*prefixes: str, weights: Sequence[float] | None = None, source: str | None = None, **fields: object) -> DataConfig:
        entries = tuple(
            CorpusConfig(prefix=prefix, weight=weight, source=source and (source,))
            for prefix, weight in zip(prefixes, weights or [1.0] * len(prefixes), strict=True)
        )
        return DataConfig(corpora=entries, **{"valid_fraction": 0.0, "shuffle_window": 8, **fields})

    return make


@pytest.fixture
def trainer_config() -> Callable[..., TrainerConfig]:
    """trainer_config(seq_len, stages=[(steps, seq_len), ...])."""

    def make(seq_len: int, stages: Sequence[tuple[int, int]] = (), **fields: object) -> TrainerConfig:
        staged = tuple(StageConfig(steps=steps, seq_len=length) for steps, length in stages)
        return TrainerConfig(seq_len=seq_len, stages=staged, **{"global_batch": 4, "steps": 100, **fields})

    return make


@pytest.fixture
def source(data_config: Callable, trainer_config: Callable) -> Callable[..., SampleSource]:
    """source(prefixes, seq_len, stages=, split=, trainer fields in `trainer`, data fields as keywords)."""

    def make(
        prefixes: str | Sequence[str],
        seq_len: int,
        stages: Sequence[tuple[int, int]] = (),
        split: str = "train",
        trainer: dict | None = None,
        vocab: int = BIG_VOCAB,
        **data: object,
    ) -> SampleSource:
        names = (prefixes,) if isinstance(prefixes, str) else prefixes
        return SampleSource(data_config(*names, **data), trainer_config(seq_len, stages, **(trainer or {})), vocab, split)

    return make
