"""engine=megatron and engine=deepspeed start from the weights of a Hugging Face, megatron-core and DeepSpeed folder alike."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lctrain.config.load import load
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig, RouterConfig
from lctrain.config.schema import TrainConfig
from lctrain.convert.native import open_native
from lctrain.data.prepare import ensure_corpora
from lctrain.engines.deepspeed.start import import_deepspeed
from lctrain.engines.make import make_engine
from lctrain.initial_weights import load_initial
from lctrain.launch.process import Process
from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.train import train

MODEL = ModelConfig(
    pattern="*-*E*-*E",
    d_model=32,
    vocab_size=320,
    norm_eps=1e-6,
    attention=AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm=True, head_dim=8),
    mlp=MlpConfig(d_ff=48),
    moe=MoeConfig(n_experts=4, top_k=2, d_ff=24, router=RouterConfig(renormalise=True), balance=BalanceConfig(bias_rate=0.0)),
    tie_embeddings=True,
)
ENGINES = {
    "megatron": ("engine=megatron", "parallel.tp=2", "parallel.pp=2", "launcher.processes=4"),
    "deepspeed": ("engine=deepspeed", "engine.zero=3", "launcher.processes=3", "trainer.global_batch=3"),
}


@pytest.fixture(autouse=True, scope="module")
def _imported_before_ranks_are_forked():
    if find_spec("megatron"):
        importlib.import_module("lctrain.engines.megatron.engine")
    if find_spec("deepspeed"):
        import_deepspeed(torch.device("cpu"))
    yield
    close_pools()


def settings(ours: Path, engine: str, *more: str) -> list[str]:
    if find_spec(engine) is None:
        pytest.skip(f"needs {engine}")
    return [
        *("--config-dir", str(ours), f"model={ours.name}", f"run_dir={ours.parent / 'run'}", "engine.device=cpu"),
        *("tracking.plot=false", "checkpoint.every=0", *ENGINES[engine], *more),
    ]


def weights(rank: int, world: int, args: list[str]) -> dict[str, torch.Tensor]:
    """What this rank has of the weights, whole."""
    config = load(TrainConfig, "train", args)
    mesh = config.mesh(rank, world)
    engine = make_engine(config, mesh, mesh.make_groups(), torch.device("cpu"))
    load_initial(config, engine)
    model = engine.state()["model"]
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).clone() for name, x in model.items()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", ["hf", "megatron", "deepspeed"])
def test_every_rank_has_the_weights(make_folder, run, tmp_path, source, engine):
    ours = make_folder(MODEL)
    family = {"family": "qwen3_moe"} if source == "hf" else {}
    run(input=ours, output=tmp_path / "theirs", to=source, **family)
    args = settings(ours, engine, f"init_from={tmp_path / 'theirs'}")
    wanted = open_native(ours).source
    seen = set()
    for found in run_ranks(weights, 4 if engine == "megatron" else 3, args):
        seen |= found.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, wanted.read(name)), name
    assert seen == wanted.infos.keys()


def losses(rank: int, world: int, args: list[str]) -> list[float] | None:
    """Losses of a whole run."""
    config = load(TrainConfig, "train", args)
    train(config, Process(rank, world, rank, world))
    if rank:
        return None
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_the_recipe_runs_alike_on_every_engine(make_folder, tmp_path):
    """recipe=extend_context, three stages of growing length: the same losses with megatron and DeepSpeed as with torch."""
    ours = make_folder()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("To be, or not to be, that is the question. " * 300)
    args = [
        *("--config-dir", str(ours), "recipe=extend_context", f"model={ours.name}", f"init_from={ours}", "engine.device=cpu"),
        *("trainer.steps=6", "trainer.seq_len=512", "trainer.global_batch=2", "optim.lr=1e-3", "optim.eps=1e-3"),
        "trainer.stages=[{steps: 2, seq_len: 128}, {steps: 2, seq_len: 256}]",
        *("model.attention.rope.original_max_position=128", "model.attention.rope.theta=10000.0"),
        *("tracking.plot=false", "checkpoint.every=0"),
        f"data.corpora=[{{prefix: {tmp_path / 'corpus'}, source: [{tmp_path / 'text'}]}}]",
    ]
    engines = {
        "torch": (2, ("parallel.cp=2",)),
        "megatron": (4, ("engine=megatron", "parallel.tp=2", "parallel.cp=2", "engine.activation_checkpointing=layer")),
        "deepspeed": (2, ("engine=deepspeed", "engine.zero=3", "parallel.cp=2", "engine.activation_checkpointing=layer")),
    }
    found = {}
    for engine, (size, more) in engines.items():
        if find_spec(engine) is None:
            pytest.skip(f"needs {engine}")
        mine = [*args, *more, f"launcher.processes={size}", f"run_dir={tmp_path / engine}"]
        config = load(TrainConfig, "train", mine)
        ensure_corpora(config.data, config.model.vocab_size)
        (tmp_path / engine).mkdir()
        found[engine] = run_ranks(losses, size, mine)[0]
    assert len(found["torch"]) == 6
    for engine in engines:
        assert found[engine] == pytest.approx(found["torch"], rel=1e-4), engine
