"""A run handed on from engine to engine and grid to grid: losses, and at the end weights and AdamW state, are one process's."""

import pytest
import torch

from lctrain.checkpoint.store import CheckpointStore
from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.config.verify import LayoutVerifyConfig
from lctrain.engines.base import StepResult, train_step
from lctrain.engines.make import make_engine
from lctrain.resume import training_state
from lctrain.verify.layout.prove import _pool
from lctrain.verify.layout.rank import CPU, _all_targets, _batches
from lctrain.verify.layout.samples import MadeSamples
from lctrain.verify.layout.shrink import shrink

pytest.importorskip("megatron.core")
pytest.importorskip("deepspeed")

STEPS = 2
"""Of every engine in the chain."""
CHAIN = (
    "engine.name=torch",
    "engine.name=megatron parallel.tp=2 parallel.pp=2",
    "engine.name=deepspeed engine.zero=3 parallel.cp=2",
    "engine.name=torch parallel.dp=2 engine.data_parallel=fsdp",
    "engine.name=deepspeed engine.zero=1 parallel.tp=2 parallel.pp=2",
    "engine.name=megatron parallel.cp=2 parallel.pp=2 engine.distributed_optimizer=false",
    "engine.name=torch",
)
MODEL = (
    "model.pattern=*EW- model.attention.window=40 model.tie_embeddings=true model.vocab_size=251 model.moe.balance.switch=0.1"
    " model.moe.balance.bias_rate=0.001"
)


def config_of(layout: str) -> TrainConfig:
    asked = load(TrainConfig, "train", [*MODEL.split(), *layout.split(), "run_dir=unused", "trainer.global_batch=4"])
    small, _ = shrink(asked, LayoutVerifyConfig(length=61, steps=STEPS * len(CHAIN)))
    trainer = small.trainer.model_copy(update={"global_batch": 4})
    return small.model_copy(update={"trainer": trainer})


def link(rank: int, size: int, config: TrainConfig, first: int, last: int, folder: str) -> tuple[list[StepResult], dict | None]:
    """Steps first to last, from the checkpoint before them and into one after them; what one process then holds, else None."""
    mesh = config.mesh(rank, size)
    engine = make_engine(config, mesh, mesh.make_groups(), CPU)
    store = CheckpointStore(folder, keep_last=STEPS * len(CHAIN))
    if first:
        state = training_state(engine, rank)
        store.load(store.folder / f"step-{first:08d}", state)
        engine.load_state(state)
    samples = MadeSamples(config.trainer.seed, config.trainer.seq_len, config.model.vocab_size)
    results = [
        train_step(engine, batch, _all_targets(batch, mesh), config.optim.lr)
        for batch in _batches(config, mesh, samples, first, last)
    ]
    store.save(last, training_state(engine, rank), {})
    if size > 1:
        return results, None
    state = engine.state()
    held = {name: x.clone() for name, x in state["model"].items()}
    for name, entry in state["optimizer"]["state"].items():
        held |= {f"{key} of {name}": x.clone() for key, x in entry.items()}
    return results, held


def run(config: TrainConfig, *arguments: object) -> tuple[list[StepResult], dict | None]:
    with _pool(config.processes, config.engine.name) as pool:
        return pool.run(link, config, *arguments, timeout_s=120)[0]


def test_losses_and_optimizer_state_go_on(tmp_path) -> None:
    one = config_of("engine.name=torch")
    expected, state = run(one, 0, STEPS * len(CHAIN), str(tmp_path / "one"))
    found = []
    for place, layout in enumerate(CHAIN):
        config = config_of(layout)
        results, held = run(config, STEPS * place, STEPS * (place + 1), str(tmp_path / "chain"))
        found += results
    assert [result.loss for result in found] == pytest.approx([result.loss for result in expected], abs=1e-5)
    assert expected[-1].loss < expected[0].loss - 0.1, "it learns"
    assert held is not None
    assert held.keys() == state.keys()
    for name, x in state.items():
        error = float((held[name] - x).norm() / x.norm().clamp(min=1e-12))
        assert error < 1e-4, f"{name}: {error:.1e}"
        assert "step of" not in name or int(torch.as_tensor(held[name])) == STEPS * len(CHAIN), name
