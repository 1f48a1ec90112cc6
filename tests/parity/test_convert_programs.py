"""The whole way with the programs themselves: transformers -> lctrain -> megatron-core, which computes with it and writes it
anew -> lctrain -> DeepSpeed's ZeRO-3 engine -> its universal checkpoint -> lctrain -> transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if any(find_spec(name) is None for name in ("transformers", "megatron", "deepspeed")):
    pytest.skip("needs transformers, megatron-core and DeepSpeed", allow_module_level=True)

import torch
from torch import nn

from lctrain.convert.huggingface import hf_logits
from lctrain.convert.native import open_native
from lctrain.convert.safetensors import SafetensorsFolder
from lctrain.convert.verify import random_tokens
from lctrain.engines.deepspeed.start import start_deepspeed
from lctrain.errors import UserError
from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.models.model import LanguageModel
from tests.conversion import run
from tests.parity.test_convert_huggingface import VOCAB, assert_same_bits, make
from tests.parity.test_convert_megatron import LENGTH, save_again, their_logits


@pytest.fixture(autouse=True)
def _end_ranks():
    yield
    close_pools()


def engine_of(model: nn.Module, stage: int, mpu: object = None):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    return start_deepspeed(torch.device("cpu")).initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]


def train_in_deepspeed(rank: int, world: int, ours: str, output: str) -> None:
    """Our weights in a ZeRO-3 engine, a step of size zero, and the checkpoint that it writes."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    native = open_native(Path(ours))
    model = LanguageModel(native.config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(native.source.read(name))
    engine = engine_of(model, 3)
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        moments = {key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")}
        engine.optimizer.optimizer.state[flat] = {"step": torch.tensor(1.0), **moments}
    engine.save_checkpoint(output, tag="step1")


def make_universal(source: Path, output: Path, *more: str) -> None:
    """The command that a refusal names."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    done = subprocess.run(
        [*command, "--input_folder", str(source), "--output_folder", str(output), *more],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_the_way_round(tmp_path):
    theirs = make(tmp_path / "start", "qwen3", vocab_size=VOCAB, tie_word_embeddings=False)
    assert run(input=theirs, output=tmp_path / "ours", to="lctrain") == 0
    settings = next((tmp_path / "ours" / "model").glob("*.yaml"))

    assert run(input=tmp_path / "ours", output=tmp_path / "megatron", to="megatron") == 0
    wanted = hf_logits(theirs, random_tokens(LENGTH, VOCAB))
    found = [out for out in run_ranks(their_logits, 4, str(tmp_path / "megatron"), 2, 2) if out is not None]
    assert len(found) == 2
    for out in found:
        assert (out - wanted).abs().max() / wanted.abs().max() < 1e-5
    run_ranks(save_again, 4, str(tmp_path / "megatron"), str(tmp_path / "again"), 2, 2)
    close_pools()
    assert run(input=tmp_path / "again", output=tmp_path / "ours2", to="lctrain", config=settings) == 0

    run_ranks(train_in_deepspeed, 2, str(tmp_path / "ours2"), str(tmp_path / "zero3"))
    make_universal(tmp_path / "zero3" / "step1", tmp_path / "universal", "--inject_missing_state")
    assert run(input=tmp_path / "universal", output=tmp_path / "ours3", to="lctrain", config=settings) == 0
    assert run(input=tmp_path / "ours3", output=tmp_path / "back", to="hf", family="qwen3") == 0
    assert_same_bits(tmp_path / "back", theirs)


class Halves(nn.Module):
    """One of two tensor-parallel ranks' part of a model: rows of some weights, columns of others, all of the rest."""

    def __init__(self, rank: int, source: SafetensorsFolder) -> None:
        super().__init__()
        for name in source.infos:
            x = source.read(name)
            axis = 1 if name.endswith(("out.weight", "down.weight")) else 0 if x.dim() > 1 else None
            self.add(name, x if axis is None else x.chunk(2, axis)[rank].contiguous())

    def add(self, name: str, x: torch.Tensor) -> None:
        *path, last = name.split(".")
        module: nn.Module = self
        for key in path:
            if not hasattr(module, key):
                module.add_module(key, nn.Module())
            module = getattr(module, key)
        module.register_parameter(last, nn.Parameter(x))


class TwoTensorParallelRanks:
    """What DeepSpeed asks of a grid."""

    def __init__(self) -> None:
        self._whole = torch.distributed.group.WORLD
        alone = [torch.distributed.new_group([rank]) for rank in range(2)]
        self._alone = alone[torch.distributed.get_rank()]

    def get_model_parallel_group(self):
        return self._whole

    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_group(self):
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank()

    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_model_parallel_world_size(self) -> int:
        return 2

    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1


def save_halves(rank: int, world: int, ours: str, output: str) -> None:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    model = Halves(rank, SafetensorsFolder(Path(ours)))
    start_deepspeed(torch.device("cpu"))
    engine = engine_of(model, 1, TwoTensorParallelRanks())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for flat in engine.optimizer.single_partition_of_fp32_groups:
        engine.optimizer.optimizer.state[flat] = {
            "step": torch.tensor(1.0),
            **{key: torch.zeros_like(flat) for key in ("exp_avg", "exp_avg_sq")},
        }
    told = {
        "universal_checkpoint_version": 0.2,
        "tp_replicated_parameter_patterns": [r".*norm\.weight"],
        "parameter_with_row_parallelism_patterns": [r".*\.out\.weight", r".*\.down\.weight"],
    }
    engine.save_checkpoint(output, tag="step1", client_state={"universal_checkpoint_info": told})


def test_what_tensor_parallel_ranks_wrote_is_read_once_it_is_universal(tmp_path):
    theirs = make(tmp_path / "start", "llama", attention_bias=False, mlp_bias=False)
    assert run(input=theirs, output=tmp_path / "ours", to="lctrain") == 0
    settings = next((tmp_path / "ours" / "model").glob("*.yaml"))
    run_ranks(save_halves, 2, str(tmp_path / "ours"), str(tmp_path / "theirs"))
    with pytest.raises(UserError) as refusal:
        assert run(input=tmp_path / "theirs", output=tmp_path / "back", to="lctrain", config=settings) == 0
    source, output = tmp_path / "theirs" / "step1", tmp_path / "theirs" / "step1_universal"
    assert f"ds_to_universal --input_folder {source} --output_folder {output})" in str(refusal.value)
    make_universal(source, output)
    assert run(input=output, output=tmp_path / "back", to="lctrain", config=settings) == 0
    assert_same_bits(tmp_path / "back", tmp_path / "ours")
