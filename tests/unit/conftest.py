"""A tiny run on made-up data, for tests of whole runs in process."""

import numpy as np
import pytest

from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.schema import CheckpointConfig, CorpusConfig, DataConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.config.tracking import TrackingConfig
from lctrain.data.indexed import IndexedWriter
from lctrain.data.sidecar import Sidecar

TINY = ModelConfig(
    pattern="*-",
    d_model=16,
    vocab_size=257,
    attention=AttentionConfig(n_heads=2, n_kv_heads=1),
    mlp=MlpConfig(d_ff=16),
)


@pytest.fixture
def corpus(tmp_path):
    """A corpus of 40 made-up documents, as settings name it."""
    prefix, rng = str(tmp_path / "corpus"), np.random.default_rng(0)
    with IndexedWriter(prefix, 257) as writer:
        for length in rng.integers(1, 200, size=40):
            writer.append(rng.integers(0, 256, length))
            writer.end_document()
        facts = (256, 257, writer.documents, writer.tokens, writer.max_id, 0, writer.sha256, ("test",), "0")
        writer.finish(Sidecar("bytes", "bytes", *facts).to_json())
    return CorpusConfig(prefix=prefix)


@pytest.fixture
def make_config(tmp_path, corpus):
    def make(steps: int = 6, checkpoint: dict | None = None, processes: int = 2, **trainer) -> TrainConfig:
        return TrainConfig(
            run_dir=str(tmp_path / "run"),
            model=TINY,
            data=DataConfig(corpora=(corpus,), valid_fraction=0.0),
            parallel=ParallelConfig(cp=processes),
            trainer=TrainerConfig(steps=steps, seq_len=101, global_batch=2, **trainer),
            checkpoint=CheckpointConfig(**{"every": 2, "keep_last": 9, **(checkpoint or {})}),
            launcher=LauncherConfig(processes=processes),
            tracking=TrackingConfig(plot=False),
        )

    return make
