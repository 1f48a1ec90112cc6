"""What decides which samples a run sees: kept with every checkpoint, so that a resume can never replay or skip data unseen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lctrain.config.schema import TrainConfig
from lctrain.data.sidecar import read_sidecar
from lctrain.errors import UserError


def data_identity(config: TrainConfig) -> dict[str, Any]:
    """JSON values, equal for two configs if and only if step t of both uses the same samples.

    Corpora count by content where a sidecar tells it, so that they may be moved. Layout, workers and the number of steps do
    not matter.
    """
    trainer, data = config.trainer, config.data
    sidecars = [(corpus, read_sidecar(corpus.prefix)) for corpus in data.corpora]
    return {
        "trainer.seed": trainer.seed,
        "trainer.global_batch": trainer.global_batch,
        "trainer.seq_len": trainer.seq_len,
        "trainer.stages": [[stage.steps, stage.seq_len] for stage in trainer.stages],
        "data.corpora": [[sidecar.sha256 if sidecar else corpus.prefix, corpus.weight] for corpus, sidecar in sidecars],
        "data.split_documents": data.split_documents,
        "data.valid_fraction": data.valid_fraction,
        "data.shuffle_window": data.shuffle_window,
    }


def check_data(config: TrainConfig, stored: dict[str, Any], path: Path) -> None:
    """UserError if `config` has other samples than checkpoint `path`, whose identity is `stored`."""
    for key, now in data_identity(config).items():
        if stored[key] != now:
            raise UserError(
                f"{key} is {_short(now)}, but checkpoint {path} was made with {_short(stored[key])}:"
                " continuing would repeat or skip samples; restore the setting, or start a new run_dir"
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
