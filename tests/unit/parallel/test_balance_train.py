"""Training with the balanced layout: the same losses, evener work, and the metric that says so."""

from pathlib import Path

import numpy as np
import pytest

from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.schema import CorpusConfig, DataConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.config.tracking import TrackingConfig
from lctrain.data.indexed import IndexedWriter
from lctrain.data.sidecar import Sidecar
from lctrain.launch.process import Process
from lctrain.launch.ranks import run_ranks
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_metrics
from lctrain.train import train


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """A corpus with documents from 1 to 2,000 tokens."""
    prefix, rng = str(tmp_path / "corpus"), np.random.default_rng(0)
    with IndexedWriter(prefix, 257) as writer:
        for length in [1, 2000, 300, 40, 900, *rng.lognormal(4, 1, size=200).astype(int) + 1]:
            writer.append(rng.integers(0, 256, length))
            writer.end_document()
        facts = (256, 257, writer.documents, writer.tokens, writer.max_id, 0, writer.sha256, ("test",), "0")
        writer.finish(Sidecar("bytes", "bytes", *facts).to_json())
    return prefix


def _train(rank: int, world_size: int, config: TrainConfig) -> int:
    return train(config, Process(rank, world_size, rank, world_size))


def _metrics(corpus: str, layout: str, pattern: str) -> list[dict]:
    run = RunDir(f"{corpus}-{layout}")
    Path(run.path).mkdir()
    config = TrainConfig(
        run_dir=str(run.path),
        model=ModelConfig(
            pattern=pattern,
            d_model=16,
            vocab_size=257,
            attention=AttentionConfig(n_heads=2, n_kv_heads=1, window=150),
            mlp=MlpConfig(d_ff=16),
        ),
        data=DataConfig(corpora=(CorpusConfig(prefix=corpus),), valid_fraction=0.0),
        parallel=ParallelConfig(cp=2, layout=layout),
        trainer=TrainerConfig(steps=2, seq_len=2051, global_batch=4, micro_batch=1),
        launcher=LauncherConfig(processes=4),
        tracking=TrackingConfig(plot=False),
    )
    assert run_ranks(_train, 4, config) == [0] * 4
    return read_metrics(run.metrics)


@pytest.mark.parametrize("pattern", ["W-*-", "W-"])
def test_same_losses_as_zigzag_with_evener_work(corpus: str, pattern: str) -> None:
    zigzag, balanced = (_metrics(corpus, layout, pattern) for layout in ("zigzag", "balanced"))
    for one, other in zip(zigzag, balanced, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["digest"] == other["digest"]
        assert 1 <= other["cp_imbalance"] <= 1.05 < one["cp_imbalance"] <= 2
