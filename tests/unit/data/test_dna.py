"""DNA end to end: a made-up genome as FASTA becomes a corpus, and `recipe=dna` trains on it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.data.indexed import IndexedDataset
from lctrain.data.prepare import ensure_corpora
from lctrain.errors import UserError

TOOL = Path(__file__).parents[3] / "tools" / "genome.py"


@pytest.fixture(scope="module")
def genome():
    spec = importlib.util.spec_from_file_location("genome_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def overrides(genome, tmp_path: Path) -> list[str]:
    assert genome.main(["--generate", "200000", str(tmp_path / "genome.fna")]) == 0
    return [
        "recipe=dna",
        f"data.corpora.0.prefix={tmp_path}/genome",
        f"data.corpora.0.source=[{tmp_path}/genome.fna]",
        f"run_dir={tmp_path}/run",
        "launcher.processes=2",
        "trainer.steps=12",
        "trainer.seq_len=512",
        "model.pattern=M-*-",
        "trainer.eval_every=0",
        "optim.schedule.warmup_steps=2",
        "tracking.plot=false",
    ]


def test_a_genome_becomes_one_token_per_base(genome, overrides: list[str], tmp_path: Path) -> None:
    config = load(TrainConfig, "train", overrides)
    ensure_corpora(config.data, config.model.vocab_size)
    dataset = IndexedDataset(str(tmp_path / "genome"))
    sequence = genome.made_up_genome(200000)
    assert len(dataset) == -(-len(sequence) // genome.RECORD)
    tokens = np.concatenate([dataset.document(number)[:-1] for number in range(len(dataset))])
    assert bytes(np.frombuffer(b"ACGT", np.uint8)[tokens]) == sequence


def test_training_learns(overrides: list[str], tmp_path: Path) -> None:
    """Two processes share every sequence, recurrent layers among them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lctrain", "train", *overrides], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 1.8
    assert losses[-1] < 1.45


def test_a_missing_genome_is_named(tmp_path: Path) -> None:
    config = load(
        TrainConfig, "train", ["recipe=dna", f"data.corpora.0.prefix={tmp_path}/genome", "data.corpora.0.source=[no.fna]"]
    )
    with pytest.raises(UserError, match=r"no\.fna"):
        ensure_corpora(config.data, config.model.vocab_size)


def test_where_there_is_no_package_a_made_up_genome_says_so(genome, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(genome, "MADE_UP", 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert genome.main([str(tmp_path / "new" / "genome.fna")]) == 0
    said = capsys.readouterr()
    assert "no real genome: apt-get download" in said.err
    assert "MADE-UP" in said.out
    assert (tmp_path / "new" / "genome.fna").read_text().startswith(">made-up:1-1000\n")
