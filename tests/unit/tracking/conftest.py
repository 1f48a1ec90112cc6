"""A run directory with a config that tracks as a test asks."""

import pytest

from lctrain.config.model import ModelConfig
from lctrain.config.schema import CorpusConfig, DataConfig, TrainConfig
from lctrain.config.tracking import TrackingConfig, WandbConfig
from lctrain.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "some-run"
    folder.mkdir()
    return RunDir(folder)


@pytest.fixture
def make_config(run):
    def make(wandb: str = "disabled", artifacts: str = "none", **tracking) -> TrainConfig:
        return TrainConfig(
            run_dir=str(run.path),
            model=ModelConfig(pattern="*-", d_model=16, vocab_size=256),
            data=DataConfig(corpora=(CorpusConfig(prefix="none"),)),
            tracking=TrackingConfig(wandb=WandbConfig(mode=wandb, artifacts=artifacts), **tracking),
        )

    return make
