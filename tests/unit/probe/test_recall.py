"""The probe's verdict on models whose memory is known, over every cut of the rows, and of every engine."""

import math
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from lctrain.config.probe import ProbeConfig
from lctrain.config.schema import EngineConfig, ParallelConfig, TrainConfig
from lctrain.data.samples import SampleSource
from lctrain.errors import UserError
from lctrain.launch.process import Process
from lctrain.launch.ranks import run_ranks
from lctrain.probe.contexts import ProbeTexts
from lctrain.probe.recall import RecallProbe
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import read_metrics
from lctrain.train import train

GRAM = 4
"""Tokens by which the stub knows where it is: the cue's length."""


class Copier:
    """Predicts what followed the latest occurrence of the last GRAM tokens of its document, `reach` tokens back at most: loss 0
    if that is right, else that of guessing among 257."""

    def __init__(self, texts: ProbeTexts, cp_rank: int, reach: float) -> None:
        self.texts, self.cp_rank, self.reach = texts, cp_rank, reach

    def token_losses(self, batches):
        rows = []
        for micro in batches:
            losses = [self.losses(self.texts.sample(index)) for index in micro.samples]
            rows.append(micro.layout.shard(torch.stack(losses), self.cp_rank, dim=1))
        return rows

    def losses(self, sample) -> torch.Tensor:
        found = np.zeros(len(sample.tokens), np.float32)
        for start, end in zip(sample.borders, sample.borders[1:], strict=False):
            tokens, seen = sample.tokens[start:end].tolist(), {}
            for at in range(len(tokens) - 1):
                gram = tuple(tokens[max(0, at - GRAM + 1) : at + 1])
                known = seen.get(gram)
                right = known is not None and at - known <= self.reach and tokens[known + 1] == tokens[at + 1]
                found[start + at] = 0.0 if right else math.log(257)
                seen[gram] = at
        return torch.from_numpy(found)


def config_of(make_config, engine: EngineConfig | None = None, grid: dict | None = None, **probe) -> TrainConfig:
    config = make_config(steps=4, processes=math.prod((grid or {}).values()), checkpoint={"every": 0})
    attention = config.model.attention.model_copy(update={"n_kv_heads": 2})
    return config.model_copy(
        update={
            "probe": ProbeConfig(**{"every": 2, "lengths": 3, "depths": 3, "passage": 12, "passages": 1, **probe}),
            "data": config.data.model_copy(update={"valid_fraction": 0.4}),
            "model": config.model.model_copy(update={"vocab_size": 258, "pattern": "*-*-", "attention": attention}),
            "engine": engine or EngineConfig(),
            "parallel": ParallelConfig(**(grid or {})),
        }
    )


def ask_copier(rank: int, world_size: int, config: TrainConfig, reach: float) -> dict:
    mesh = config.mesh(rank, world_size)
    source = SampleSource(config.data, config.trainer, config.model.vocab_size, "valid")
    texts = ProbeTexts(config.probe, config.trainer.seq_len, source)
    return RecallProbe(config, mesh, Copier(texts, mesh.cp_rank, reach), source).run()


@pytest.mark.parametrize("grid", [{}, {"cp": 2}, {"cp": 3, "layout": "balanced"}, {"dp": 2, "cp": 2, "layout": "striped"}])
def test_a_model_that_copies_as_far_as_it_reaches(make_config, grid):
    sizes = {name: size for name, size in grid.items() if isinstance(size, int)}
    config = config_of(make_config, grid=sizes)
    config = config.model_copy(update={"parallel": ParallelConfig(**grid)})
    processes = max(1, math.prod(sizes.values()))
    for answer in run_ranks(ask_copier, processes, config, math.inf):
        assert answer == {"recall": 1.0, "recall_101": [1.0] * 3, "recall_50": [1.0] * 3}
    for answer in run_ranks(ask_copier, processes, config, 50):
        assert answer == {"recall": 0.6667, "recall_101": [0.0, 0.0, 1.0], "recall_50": [1.0] * 3}
    for answer in run_ranks(ask_copier, processes, config, 0):
        assert answer["recall"] == 0.0


def run(rank: int, world_size: int, config: TrainConfig) -> int:
    torch.set_num_threads(1)
    return train(config, Process(rank, world_size, rank, world_size))


def records(config: TrainConfig, run_dir: str) -> list[dict]:
    config = config.model_copy(update={"run_dir": run_dir})
    assert run_ranks(run, config.launcher.processes, config) == [0] * config.launcher.processes
    return read_metrics(RunDir(run_dir).metrics)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("engine", "grid"),
    [
        pytest.param(EngineConfig(), {"cp": 2}, id="torch, cp"),
        pytest.param(EngineConfig(data_parallel="fsdp"), {"dp": 2}, id="torch, fsdp", marks=slow),
        pytest.param(EngineConfig(name="megatron"), {"tp": 2}, id="megatron, tp", marks=slow),
        pytest.param(EngineConfig(name="megatron"), {"pp": 2}, id="megatron, pp"),
        pytest.param(EngineConfig(name="megatron"), {"dp": 2, "pp": 2}, id="megatron, dp, pp", marks=slow),
        pytest.param(EngineConfig(name="deepspeed", zero=3), {"cp": 2}, id="deepspeed, zero 3", marks=slow),
        pytest.param(EngineConfig(name="deepspeed"), {"pp": 2}, id="deepspeed, pp"),
    ],
)
def test_every_engine_and_layout_finds_the_same(make_config, tmp_path, engine, grid):
    if engine.name != "torch" and find_spec(engine.name) is None:
        pytest.skip(f"needs {engine.name}")
    reference = records(config_of(make_config), str(tmp_path / "reference"))
    assert [("recall" in record, "recall_50" in record) for record in reference] == [(False,) * 2, (True,) * 2] * 2
    found = records(config_of(make_config, engine, grid), str(tmp_path / "run"))
    for there, here in zip(reference, found, strict=True):
        assert here["digest"] == there["digest"]
        for key in ("recall", "recall_101", "recall_50"):
            if key in there:
                np.testing.assert_allclose(here[key], there[key], atol=2e-4, err_msg=key)


def test_it_disturbs_nothing_and_comes_again_after_a_resume(make_config, tmp_path):
    config = config_of(make_config)
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 3})})
    without = config.model_copy(update={"probe": ProbeConfig()})
    with_probe, plain = records(config, str(tmp_path / "with")), records(without, str(tmp_path / "without"))
    for key in ("loss", "grad_norm", "digest", "consumed"):
        assert [record[key] for record in with_probe] == [record[key] for record in plain]
    shutil.rmtree(RunDir(str(tmp_path / "with")).checkpoints / "step-00000004")
    again = records(config, str(tmp_path / "with"))
    for key in ("step", "loss", "recall", "recall_101", "recall_50"):
        assert [record.get(key) for record in again] == [record.get(key) for record in with_probe]


def test_what_does_not_fit_is_refused_with_the_fix(make_config):
    config = make_config()
    with pytest.raises(
        ValueError, match=r"probe.passage=48 needs trainer.seq_len=101 to be at least 192: lower probe.passage to 25"
    ):
        TrainConfig.model_validate(config.model_dump() | {"probe": {"every": 1}})
    with pytest.raises(UserError, match=r"no document is held out .* trainer.eval_every=0 and probe.every=0"):
        SampleSource(config.data, config.trainer, 257, "valid")
