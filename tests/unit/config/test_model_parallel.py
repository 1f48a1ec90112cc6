"""Layouts that a model cannot be divided into are refused with the values that could be, before any process starts."""

import pytest

from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.launcher import LauncherConfig
from lctrain.config.mamba import MambaConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig


def config(
    pattern: str = "*-*-", engine: str = "megatron", global_batch: int = 8, vocab: int = 96, **parallel: int
) -> TrainConfig:
    processes = parallel.get("tp", 1) * parallel.get("pp", 1)
    return TrainConfig(
        run_dir="unused",
        model=ModelConfig(
            pattern=pattern,
            d_model=48,
            vocab_size=vocab,
            attention=AttentionConfig(n_heads=12, n_kv_heads=4),
            mlp=MlpConfig(d_ff=72),
            mamba=MambaConfig(head_dim=12, n_groups=2),
            latent_attention=LatentAttentionConfig(n_heads=2),
        ),
        data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
        parallel=ParallelConfig(**parallel),
        engine=EngineConfig(name=engine),
        trainer=TrainerConfig(global_batch=global_batch),
        launcher=LauncherConfig(processes=processes),
    )


@pytest.mark.parametrize(
    "parallel",
    [{"tp": 2}, {"tp": 4}, {"tp": 12}, {"pp": 4}, {"tp": 2, "pp": 2, "virtual_stages": 2}, {"tp": 2, "vocab": 61}],
)
def test_what_divides_is_taken(parallel: dict[str, int]) -> None:
    config(**parallel)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tp": 5}, r"parallel.tp=5 does not divide model.attention.n_heads=12; for this model it can be 1, 2, 4"),
        ({"tp": 8}, r"parallel.tp=8 does not divide model.attention.n_heads=12; .* 1, 2, 4, 12"),
        ({"tp": 3}, r"parallel.tp=3 neither divides model.attention.n_kv_heads=4 nor is a multiple of it; .* 1, 2, 4"),
        ({"tp": 16, "pattern": "--"}, r"parallel.tp=16 does not divide model.mlp.d_ff=72; .* 1, 2, 3, 4, 6, 8, 9, 12, 24"),
        ({"tp": 4, "pattern": "M-"}, r"parallel.tp=4 does not divide model.mamba.n_groups=2; .* 1, 2 \["),
        ({"tp": 4, "pattern": "+-"}, r"parallel.tp=4 does not divide model.latent_attention.n_heads=2"),
        ({"tp": 4, "vocab": 5}, r"parallel.tp=4 leaves the last rank without a row of model.vocab_size=5; .* be 1, 2 \["),
        ({"pp": 8}, r"parallel.pp=8 is 8 stages for 4 sublayers of model.pattern '\*-\*-'; take at most 4"),
        ({"pp": 2, "virtual_stages": 3}, r"parallel.pp=2 x parallel.virtual_stages=3 is 6 stages for 4 sublayers"),
        ({"pp": 2, "pattern": "*|-*|-"}, r"2 cuts '\|', so 3 stages, but parallel.pp=2 is 2"),
        ({"virtual_stages": 2}, r"parallel.virtual_stages=2 needs parallel.pp of 2 or more"),
        ({"pp": 2, "virtual_stages": 2, "global_batch": 7}, r"7 micro-batches, not a multiple of parallel.pp=2.*fits: 8"),
        ({"tp": 2, "engine": "torch"}, r"parallel.tp=2 needs engine.name=megatron"),
    ],
)
def test_what_does_not_divide_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**change)
