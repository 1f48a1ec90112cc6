"""engine=megatron on any grid computes what the torch engine does in one process: loss, gradients, norm, weights, state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lctrain.checkpoint.store import CheckpointStore
from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig
from lctrain.config.optim import OptimConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.data.batch import StepBatch
from lctrain.engines.base import Engine, StepResult, train_step
from lctrain.engines.make import make_engine
from lctrain.engines.megatron import engine as _imported_before_ranks_are_forked  # noqa: F401
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.mesh import ProcessMesh
from tests.mixers import MIXERS

VOCAB = 64
MIXED = "*E-E"
HYBRID = "ML+-"
GLOBAL_BATCH = 6


@dataclasses.dataclass(frozen=True)
class Case:
    """One engine and grid. pattern, tie, kv_heads, length, vocab must be equal in two that are compared."""

    engine: str = "megatron"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    virtual_stages: int = 1
    distributed_optimizer: bool = True
    attention: str = "ring"
    layout: str = "zigzag"
    checkpointing: str = "none"
    micro_batch: int = 1
    pattern: str = "*-W-"
    tie: bool = False
    kv_heads: int = 2
    length: int = 101
    vocab: int = VOCAB
    dtype: str = "fp32"

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def config(self) -> TrainConfig:
        return TrainConfig(
            run_dir="unused",
            model=ModelConfig(
                pattern=self.pattern,
                d_model=32,
                vocab_size=self.vocab,
                tie_embeddings=self.tie,
                attention=AttentionConfig(n_heads=4, n_kv_heads=self.kv_heads, window=20, qk_norm=True, bias=True, sinks=True),
                mlp=MlpConfig(d_ff=48),
                **MIXERS,
                moe=MoeConfig(
                    n_experts=4,
                    d_ff=24,
                    shared_d_ff=16,
                    shared_gate=True,
                    balance=BalanceConfig(switch=1e-2, z_loss=1e-3, bias_rate=1e-3),
                ),
            ),
            data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
            parallel=ParallelConfig(
                tp=self.tp,
                pp=self.pp,
                cp=self.cp,
                ep=self.ep,
                etp=self.etp,
                virtual_stages=self.virtual_stages,
                attention=self.attention,
                layout=self.layout,
            ),
            engine=EngineConfig(
                name=self.engine,
                distributed_optimizer=self.distributed_optimizer,
                activation_checkpointing=self.checkpointing,
                dtype=self.dtype,
                device="cpu",
            ),
            optim=OptimConfig(clip_norm=0.5, eps=1e-3),  # eps: Adam must not blow up the noise of near-zero gradients
            trainer=TrainerConfig(
                seq_len=self.length, global_batch=GLOBAL_BATCH, micro_batch=self.micro_batch, z_loss=1e-4, loss_chunk=30
            ),
            launcher=LauncherConfig(processes=self.size),
        )

    def reference(self) -> Case:
        same = ("pattern", "tie", "kv_heads", "length", "vocab", "dtype")
        return Case("torch", **{name: getattr(self, name) for name in same})


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def make(case: Case, rank: int, size: int) -> tuple[Engine, ProcessMesh]:
    config = case.config()
    mesh = config.mesh(rank, size)
    return make_engine(config, mesh, mesh.make_groups(), torch.device("cpu")), mesh


def train_steps(rank: int, size: int, case: Case, make_batch: Callable, steps: int) -> dict[str, Any]:
    """Results, first gradients, and this rank's (whole) weights and moments after the last step; evaluation before."""
    engine, mesh = make(case, rank, size)
    results: list[StepResult] = []
    gradients: dict[str, Tensor] = {}
    evaluation = engine.evaluate(make_batch(case, mesh, 7).micro_batches)
    for step in range(steps):
        batch = make_batch(case, mesh, step)
        targets = count_targets(batch, mesh)
        if step:
            results.append(train_step(engine, batch, targets, 1e-3))
            continue
        results.append(engine.backward(batch, targets))
        gradients = engine.gradients()
        engine.update(1e-3)
    state = engine.state()
    weights = {name: whole(x) for name, x in state["model"].items()}
    moments = {f"{name}/{key}": whole(x) for name, entry in state["optimizer"]["state"].items() for key, x in entry.items()}
    groups = state["optimizer"]["param_groups"]
    return {
        "results": results,
        "gradients": gradients,
        "weights": weights,
        "moments": moments,
        "groups": groups,
        "eval": evaluation,
    }


def count_targets(batch: StepBatch, mesh: ProcessMesh) -> int:
    targets = torch.tensor(
        sum(micro.targets for micro in batch.micro_batches) * (mesh.cp_rank + mesh.tp_rank + mesh.pp_rank == 0)
    )
    if mesh.size > 1:
        torch.distributed.all_reduce(targets)
    return int(targets)


@pytest.fixture(scope="module")
def outcome(world) -> Callable[..., dict[str, Any]]:
    """outcome(case, steps): merged over ranks; those of one process are remembered."""
    remembered: dict[tuple[Case, int], dict[str, Any]] = {}

    def run(case: Case, steps: int = 3) -> dict[str, Any]:
        if (case, steps) in remembered:
            return remembered[case, steps]
        ranks = run_ranks(train_steps, case.size, case, world["make_batch"], steps)
        for other in ranks:
            assert other["results"] == ranks[0]["results"], "ranks report different losses or norms"
            assert other["eval"] == ranks[0]["eval"]
        merged = dict(ranks[0])
        for part in ("weights", "moments"):
            merged[part] = {name: x for other in ranks for name, x in other[part].items()}
            for other in ranks:
                for name, x in other[part].items():
                    assert torch.equal(x, merged[part][name]), f"ranks differ in {name}"
        if case.size == 1:
            remembered[case, steps] = merged
        return merged

    return run


def check(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    first, expected = ours["results"][0], theirs["results"][0]
    assert expected.grad_norm > 0.5, "clipping takes part in what is compared"
    assert first.loss == pytest.approx(expected.loss, abs=1e-6)
    assert first.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    assert ours["eval"] == pytest.approx(theirs["eval"], abs=1e-6)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, gradient in theirs["gradients"].items():
        error = float((ours["gradients"][name] - gradient).norm() / gradient.norm())
        assert error < 1e-5, f"gradient of {name}: {error:.1e}"
    for mine, other in zip(ours["results"], theirs["results"], strict=True):
        assert mine.problem is None
        assert mine.loss == pytest.approx(other.loss, abs=1e-5)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        assert float((ours["weights"][name] - weight).abs().max()) < 1e-5, name
    assert ours["moments"].keys() == theirs["moments"].keys()
    for name, moment in theirs["moments"].items():
        error = float((ours["moments"][name] - moment).norm() / moment.norm())
        assert error < 1e-4, f"{name}: {error:.1e}"
    for name in theirs["results"][0].extra:
        for mine, other in zip(ours["results"], theirs["results"], strict=True):
            assert torch.allclose(torch.tensor(mine.extra[name]), torch.tensor(other.extra[name]), rtol=1e-2, atol=1e-4), name
    assert ours["groups"] == [{**group, "lr": mine["lr"]} for group, mine in zip(theirs["groups"], ours["groups"], strict=True)]


CASES = {
    "one process": Case(),
    "one process, plain optimizer": Case(distributed_optimizer=False),
    "tp2": Case(tp=2),
    "tp2, plain optimizer, checkpointing": Case(tp=2, distributed_optimizer=False, checkpointing="layer"),
    "tp2, one KV head, tied, two rows": Case(tp=2, kv_heads=1, tie=True, micro_batch=2),
    "dp2 cp2, plain optimizer": Case(dp=2, cp=2, distributed_optimizer=False),
    "pp2": Case(pp=2),
    "pp2, tied, checkpointing": Case(pp=2, tie=True, checkpointing="layer"),
    "pp3": Case(pp=3),
    "pp2 interleaved": Case(pp=2, virtual_stages=2),
    "pp2 interleaved, tied": Case(pp=2, virtual_stages=2, tie=True, checkpointing="layer"),
    "tp2 pp2": Case(tp=2, pp=2, length=103),
    "tp2 pp2 interleaved, plain optimizer": Case(tp=2, pp=2, virtual_stages=2, distributed_optimizer=False),
    "cp2 pp2": Case(cp=2, pp=2, micro_batch=2),
    "tp2 cp2, all_gather": Case(tp=2, cp=2, attention="all_gather"),
    "tp2 cp2, ulysses, one KV head": Case(tp=2, cp=2, attention="ulysses", kv_heads=1, tie=True),
    "tp2 dp2, tied": Case(tp=2, dp=2, tie=True),
    "pp2 dp2, tied, given cuts": Case(pp=2, dp=2, tie=True, pattern="*|-W-"),
    "mixtures: one process": Case(pattern=MIXED),
    "mixtures: tp2": Case(pattern=MIXED, tp=2),
    "mixtures: pp2 ep2 dp2": Case(pattern=MIXED, pp=2, ep=2, dp=2),
    "mixtures: tp2 cp2 ep4, plain optimizer": Case(pattern=MIXED, tp=2, cp=2, ep=4, distributed_optimizer=False),
    "mixtures: tp2 pp2 ep2, interleaved": Case(pattern=MIXED, tp=2, pp=2, ep=2, virtual_stages=2),
    "mixtures: tp2 etp2 dp2": Case(pattern=MIXED, tp=2, etp=2, dp=2),
    "hybrid: tp2": Case(pattern=HYBRID, tp=2),
    "hybrid: cp2 pp2": Case(pattern=HYBRID, cp=2, pp=2),
    "hybrid: tp2 cp2": Case(pattern=HYBRID, tp=2, cp=2),
    "tp2 cp2 pp2": Case(tp=2, cp=2, pp=2, tie=True),
    "tp2 dp2, odd vocabulary": Case(tp=2, dp=2, vocab=61),
    "tp2 pp2, odd vocabulary, tied, plain optimizer": Case(tp=2, pp=2, vocab=61, tie=True, distributed_optimizer=False),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_torch_engine(outcome, name: str) -> None:
    case = CASES[name]
    reference = dataclasses.replace(case.reference(), pattern=case.pattern.replace("|", ""))
    check(outcome(case), outcome(reference))


def save_after(rank: int, size: int, case: Case, make_batch: Callable, folder: str) -> None:
    """Two steps, then a checkpoint."""
    engine, mesh = make(case, rank, size)
    for step in range(2):
        batch = make_batch(case, mesh, step)
        train_step(engine, batch, count_targets(batch, mesh), 1e-3)
    CheckpointStore(folder, 1).save(2, engine.state(), {"saved by": case.engine})


def continue_from(rank: int, size: int, case: Case, make_batch: Callable, folder: str) -> list[StepResult]:
    """The checkpoint, then two more steps."""
    engine, mesh = make(case, rank, size)
    state = engine.state()
    store = CheckpointStore(folder, 1)
    assert store.load(store.newest_verified(), state)["saved by"]
    engine.load_state(state)
    results = []
    for step in range(2, 4):
        batch = make_batch(case, mesh, step)
        results.append(train_step(engine, batch, count_targets(batch, mesh), 1e-3))
    return results


CONTINUED = {
    "torch, then tp2 pp2": (Case("torch", tie=True), Case(tp=2, pp=2, tie=True)),
    "tp2 pp2, then torch": (Case(tp=2, pp=2, tie=True), Case("torch", tie=True)),
    "odd vocabulary: tp2, then torch dp2": (Case(tp=2, vocab=61), Case("torch", dp=2, vocab=61)),
    "mixtures: torch dp2 ep2, then tp2 cp2 ep4": (
        Case("torch", dp=2, ep=2, pattern=MIXED),
        Case(tp=2, cp=2, ep=4, pattern=MIXED),
    ),
    "mixtures: tp2 cp2 ep4, then pp2 dp2, plain optimizer": (
        Case(tp=2, cp=2, ep=4, pattern=MIXED),
        Case(pp=2, dp=2, pattern=MIXED, distributed_optimizer=False),
    ),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_a_checkpoint_goes_on_under_another_engine_and_grid(outcome, world, name: str, tmp_path) -> None:
    before, after = CONTINUED[name]
    run_ranks(save_after, before.size, before, world["make_batch"], str(tmp_path))
    continued = run_ranks(continue_from, after.size, after, world["make_batch"], str(tmp_path))[0]
    for ours, theirs in zip(continued, outcome(after.reference(), 4)["results"][2:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, pp=2, dtype="bf16"),
        Case(dp=2, dtype="bf16", distributed_optimizer=False),
        Case(pp=2, virtual_stages=2, pattern="M-E-", dtype="bf16"),
    ],
    ids=["tp2 pp2", "dp2, plain optimizer", "interleaved, fp32 states and routers"],
)
def test_half_precision_stays_near_one_process(outcome, case: Case) -> None:
    """Weights are bf16 and main weights fp32: what differs from one process is rounding, and not the initial weights."""
    theirs, ours = outcome(case.reference()), outcome(case)
    for mine, other in zip(ours["results"], theirs["results"], strict=True):
        assert mine.loss == pytest.approx(other.loss, abs=2e-3)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=2e-2)
    for name, weight in theirs["weights"].items():
        assert weight.dtype == ours["weights"][name].dtype == torch.float32
        assert float((ours["weights"][name] - weight).abs().max()) < 4e-3, name


def poisoned(rank: int, size: int, case: Case, make_batch: Callable) -> tuple[str | None, StepResult]:
    """A step with a weight that is not finite on the last stage, then one without it."""
    engine, mesh = make(case, rank, size)
    norm = engine.parameters.get("norm.weight")  # type: ignore[attr-defined]
    batch = make_batch(case, mesh, 0)
    targets = count_targets(batch, mesh)
    if norm is not None:
        norm.data.fill_(torch.nan)
    bad = train_step(engine, batch, targets, 1e-3)
    if norm is not None:
        norm.data.fill_(1.0)
    return bad.problem, train_step(engine, batch, targets, 1e-3)


@pytest.mark.parametrize("case", [Case(tp=2, pp=2), Case(dp=2, distributed_optimizer=False)], ids=["tp2 pp2", "dp2 plain"])
def test_a_step_that_is_not_finite_updates_nothing(outcome, world, case: Case) -> None:
    for problem, after in run_ranks(poisoned, case.size, case, world["make_batch"]):
        assert problem is not None
        assert "first not finite on rank" in problem
        assert "document" in problem
        assert after.problem is None
        assert after.loss == pytest.approx(outcome(case.reference())["results"][0].loss, abs=1e-6)
