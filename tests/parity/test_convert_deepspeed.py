"""DeepSpeed's checkpoints: what it writes at every ZeRO stage is read, and what we write it loads."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

import torch
from torch import nn

from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig
from lctrain.convert.native import open_native
from lctrain.convert.safetensors import SafetensorsFolder
from lctrain.engines.deepspeed.start import start_deepspeed
from lctrain.errors import UserError
from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.models.model import LanguageModel
from tests.conversion import random_model, run

CONFIG = ModelConfig(
    pattern="*-*E",
    d_model=24,
    vocab_size=61,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, bias=True, head_dim=6),
    mlp=MlpConfig(d_ff=35),
    moe=MoeConfig(n_experts=4, d_ff=17, balance=BalanceConfig(bias_rate=0.001)),
)


def make_engine(model: nn.Module, stage: int, universal: bool):
    deepspeed = start_deepspeed(torch.device("cpu"))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "checkpoint": {"load_universal": universal},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def save(rank: int, world: int, ours: str, output: str, stage: int) -> None:
    """Our weights in a DeepSpeed engine, which then writes its own checkpoint."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    native = open_native(Path(ours))
    model = LanguageModel(CONFIG)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(native.source.read(name))
    engine = make_engine(model, stage, False)
    if stage == 3:  # as after a step: its conversion to universal wants moments
        for flat in engine.optimizer.fp32_partitioned_groups_flat:
            moments = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
            engine.optimizer.optimizer.state[flat] = {"step": torch.tensor(1.0), **moments}
    engine.save_checkpoint(output, tag="step1")


def load(rank: int, world: int, folder: str, stage: int):
    """A universal checkpoint in a DeepSpeed engine; its whole fp32 parameters."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    model = LanguageModel(CONFIG)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    engine = make_engine(model, stage, True)
    engine.load_checkpoint(folder)
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in engine.module.named_parameters()}


@pytest.fixture(scope="module", autouse=True)
def _end_ranks():
    """Every model that megatron-core or DeepSpeed builds leaves process groups, with threads of their own."""
    yield
    close_pools()


def assert_same(found: Path, wanted: Path) -> None:
    a, b = SafetensorsFolder(found), SafetensorsFolder(wanted)
    assert dict(a.infos) == dict(b.infos)
    for name in b.infos:
        assert torch.equal(a.read(name), b.read(name)), name


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (2, 3), (3, 2), (3, 3)])
def test_every_stage_is_read(tmp_path, stage, world):
    ours = random_model(tmp_path / "ours", CONFIG)
    run_ranks(save, world, str(ours), str(tmp_path / "theirs"), stage)
    with pytest.raises(UserError, match=r"config=FILE\.yaml"):
        run(input=tmp_path / "theirs", output=tmp_path / "back", to="lctrain")
    settings = ours / "model" / "ours.yaml"
    assert run(input=tmp_path / "theirs", output=tmp_path / "back", to="lctrain", config=settings, verify=True) == 0
    assert_same(tmp_path / "back", ours)


def test_missing_ranks_are_told(tmp_path):
    ours = random_model(tmp_path / "ours", CONFIG)
    run_ranks(save, 2, str(ours), str(tmp_path / "theirs"), 2)
    next((tmp_path / "theirs" / "step1").glob("*zero_pp_rank_1_*optim*")).unlink()
    with pytest.raises(UserError, match="it has 1 of 2 optimizer files"):
        run(input=tmp_path / "theirs", output=tmp_path / "back", to="lctrain", config=ours / "model" / "ours.yaml")


@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 1), (3, 2)])
def test_a_universal_checkpoint_of_ours_is_loaded(tmp_path, stage, world):
    ours = random_model(tmp_path / "ours", CONFIG)
    assert run(input=ours, output=tmp_path / "universal", to="deepspeed", verify=True) == 0
    source = SafetensorsFolder(ours)
    for found in run_ranks(load, world, str(tmp_path / "universal"), stage):
        for name, tensor in found.items():
            assert torch.equal(tensor, source.read(name)), name
    assert run(input=tmp_path / "universal", output=tmp_path / "back", to="lctrain") == 0
    assert_same(tmp_path / "back", ours)


def make_universal(rank: int, world: int, source: str, output: str) -> None:
    """DeepSpeed's own conversion, in a process that may start others."""
    import multiprocessing

    multiprocessing.current_process()._config["daemon"] = False
    from deepspeed.checkpoint import ds_to_universal

    arguments = ["--input_folder", source, "--output_folder", output, "--num_extract_workers", "1", "--num_merge_workers", "1"]
    import sys
    from unittest.mock import patch

    with patch.object(sys, "argv", ["ds_to_universal", *arguments, "--inject_missing_state"]):
        ds_to_universal.main(ds_to_universal.parse_arguments())


def test_its_own_universal_checkpoint_is_read(tmp_path):
    ours = random_model(tmp_path / "ours", CONFIG)
    run_ranks(save, 2, str(ours), str(tmp_path / "theirs"), 3)
    run_ranks(make_universal, 1, str(tmp_path / "theirs" / "step1"), str(tmp_path / "universal"))
    assert run(input=tmp_path / "universal", output=tmp_path / "back", to="lctrain", config=ours / "model" / "ours.yaml") == 0
    assert_same(tmp_path / "back", ours)
