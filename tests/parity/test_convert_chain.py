"""Hugging Face -> lctrain -> megatron-core -> lctrain -> DeepSpeed -> lctrain -> Hugging Face: every bit arrives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig, RouterConfig
from lctrain.convert.families import FAMILIES, family_for
from lctrain.convert.listing import families_table, list_families
from lctrain.convert.safetensors import SafetensorsFolder
from tests.conversion import random_model, run

ATTENTION = AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=8)
CONFIGS = {
    "llama": ModelConfig(pattern="(*-){3}", d_model=32, vocab_size=100, attention=ATTENTION, mlp=MlpConfig(d_ff=48)),
    "mixtral": ModelConfig(
        pattern="(WE){2}",
        d_model=32,
        vocab_size=100,
        attention=ATTENTION.model_copy(update={"window": 8}),
        moe=MoeConfig(n_experts=4, d_ff=24),
        tie_embeddings=True,
    ),
    "nemotron_h": ModelConfig(
        pattern="M-*EM",
        d_model=32,
        vocab_size=100,
        attention=ATTENTION.model_copy(update={"rotary": False}),
        mamba={"head_dim": 8, "d_state": 16, "n_groups": 2},
        mlp=MlpConfig(d_ff=48, activation="relu2"),
        moe=MoeConfig(
            n_experts=4,
            d_ff=24,
            shared_d_ff=20,
            activation="relu2",
            router=RouterConfig(score="sigmoid"),
            balance=BalanceConfig(bias_rate=0.001),
        ),
    ),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_through_all(tmp_path, name, dtype):
    """DeepSpeed's universal checkpoints hold fp32, so what was bf16 is rounded once at the end, to what it was."""
    config = CONFIGS[name]
    start = random_model(tmp_path / "start", config)
    assert run(input=start, output=tmp_path / "hf", to="hf", family=name, dtype=dtype) == 0
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    stages = ["lctrain", "megatron", "lctrain", "deepspeed", "lctrain", "hf"]
    folder = tmp_path / "hf"
    for number, to in enumerate(stages):
        output = tmp_path / f"{number}-{to}"
        last = {"dtype": dtype} if to == "hf" else {}
        assert run(input=folder, output=output, to=to, vocab_multiple=64 if number == 0 else 1, **last) == 0
        folder = output
    a, b = SafetensorsFolder(tmp_path / "hf"), SafetensorsFolder(folder)
    assert dict(a.infos) == dict(b.infos)
    for tensor in a.infos:
        assert torch.equal(a.read(tensor), b.read(tensor)), tensor
    before, after = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "hf", folder))
    assert before == after


def test_the_list_is_made_from_the_tables():
    columns, rows = families_table()
    assert [row[0] for row in rows] == list(FAMILIES)
    assert columns[0] == "family"
    assert dict(zip(FAMILIES, (row[2] for row in rows), strict=True))["nemotron_h"] == "*M-E"


def test_the_documents_show_the_list(capsys):
    list_families()
    shown = capsys.readouterr().out.strip()
    assert "jamba: refused are Mamba-1 layers" in shown
    for path in ("README.md", "docs/convert.md"):
        text = (Path(__file__).parents[2] / path).read_text()
        assert "\n".join(line.rstrip() for line in shown.splitlines()) in text, path


def test_a_model_finds_its_family():
    assert family_for(CONFIGS["llama"]).name == "llama"
    assert family_for(CONFIGS["nemotron_h"]).name == "nemotron_h"
