"""engine=deepspeed under every ZeRO stage computes what the torch engine does in one process: loss, gradients, norm, state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lctrain.checkpoint.store import CheckpointStore
from lctrain.config.launcher import LauncherConfig
from lctrain.config.mamba import LinearAttentionConfig, MambaConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig
from lctrain.config.optim import OptimConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.engines.base import Engine, StepResult, train_step
from lctrain.engines.deepspeed.start import import_deepspeed
from lctrain.engines.make import make_engine
from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.parallel.mesh import ProcessMesh

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")

VOCAB = 64
MIXED = "*E-E"
HYBRID = "MEL*"
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""ZeRO-3 leaves parameters as small as those here whole, unless it is told otherwise."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One engine and grid. pattern, tie, length and vocab must be equal in two that are compared."""

    zero: int | None = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    attention: str = "ring"
    layout: str = "zigzag"
    checkpointing: str = "none"
    micro_batch: int = 3
    pattern: str = "*-W-"
    tie: bool = False
    length: int = 101
    vocab: int = VOCAB
    dtype: str = "fp32"
    persist: bool = False
    offload: str = ""
    mixed: bool = False
    """Samples of another length in the second and third step."""

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def engine(self) -> EngineConfig:
        name = "torch" if self.zero is None else "deepspeed"
        given: dict[str, Any] | None = None
        if self.zero is not None:
            zero = {} if self.persist else dict(CUT_ALL["zero_optimization"])
            given = {"zero_optimization": {**zero, **{f"offload_{what}": {"device": "cpu"} for what in self.offload.split()}}}
        return EngineConfig(
            name=name,
            zero=self.zero,
            deepspeed_config=given,
            activation_checkpointing=self.checkpointing,
            dtype=self.dtype,
            device="cpu",
        )

    def config(self) -> TrainConfig:
        return TrainConfig(
            run_dir="unused",
            model=ModelConfig(
                pattern=self.pattern,
                d_model=32,
                vocab_size=self.vocab,
                tie_embeddings=self.tie,
                attention=AttentionConfig(n_heads=4, n_kv_heads=2, window=20, qk_norm=True, bias=True, sinks=True),
                mlp=MlpConfig(d_ff=48),
                mamba=MambaConfig(head_dim=8, d_state=8, n_groups=2, chunk=16),
                linear_attention=LinearAttentionConfig(n_heads=4),
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
                attention=self.attention,
                layout=self.layout,
            ),
            engine=self.engine,
            optim=OptimConfig(clip_norm=0.5, eps=1e-3),  # eps: Adam must not blow up the noise of near-zero gradients
            trainer=TrainerConfig(
                seq_len=self.length, global_batch=6, micro_batch=self.micro_batch, z_loss=1e-4, loss_chunk=30
            ),
            launcher=LauncherConfig(processes=self.size),
        )

    def reference(self) -> Case:
        pattern = self.pattern.replace("|", "")
        rows = self.micro_batch if "E" in pattern or self.mixed else 3  # balancing losses count over a micro-batch
        same = {name: getattr(self, name) for name in ("tie", "length", "vocab", "dtype", "mixed")}
        return Case(None, pattern=pattern, micro_batch=rows, **same)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def make(case: Case, rank: int, size: int) -> tuple[Engine, ProcessMesh]:
    config = case.config()
    mesh = config.mesh(rank, size)
    return make_engine(config, mesh, mesh.make_groups(), torch.device("cpu")), mesh


def count_targets(batch: Any, mesh: ProcessMesh) -> int:
    targets = torch.tensor(sum(micro.targets for micro in batch.micro_batches) * mesh.counts_rows)
    if mesh.size > 1:
        torch.distributed.all_reduce(targets)
    return int(targets)


def flat_state(engine: Engine) -> dict[str, Tensor]:
    """Weights and moments, whole, by names of one level."""
    state = engine.state()
    found = {name: whole(x) for name, x in state["model"].items()}
    for name, entry in state["optimizer"]["state"].items():
        found |= {f"{key}/{name}": whole(x) for key, x in entry.items()}
    return found


def train_steps(rank: int, size: int, case: Case, make_batch: Callable, steps: int) -> dict[str, Any]:
    """Results, first gradients, and this rank's (whole) weights and moments after the last step; evaluation before."""
    engine, mesh = make(case, rank, size)
    results: list[StepResult] = []
    gradients: dict[str, Tensor] = {}
    evaluation = engine.evaluate(make_batch(case, mesh, 7).micro_batches)
    for step in range(steps):
        batch = make_batch(case, mesh, step)
        if case.mixed and step:
            short = make_batch(dataclasses.replace(case, length=110), mesh, step)
            kept = batch.micro_batches[:-1] if step == 1 else ()
            batch = dataclasses.replace(short, micro_batches=(*kept, *short.micro_batches[len(kept) :]))
        targets = count_targets(batch, mesh)
        if step:
            results.append(train_step(engine, batch, targets, 1e-3))
            continue
        engine.backward(batch, targets)  # once more after that was discarded: nothing may be left of it
        engine.discard()
        results.append(engine.backward(batch, targets))
        gradients = engine.gradients()
        engine.update(1e-3)
    groups = engine.state()["optimizer"]["param_groups"]
    return {"results": results, "gradients": gradients, "state": flat_state(engine), "groups": groups, "eval": evaluation}


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """Ranks forked from now on need not import DeepSpeed, and torch's AdamW, each for itself."""
    close_pools()
    import_deepspeed(torch.device("cpu"))
    torch.optim.AdamW([torch.nn.Parameter(torch.empty(1))])


@pytest.fixture(scope="module")
def outcome(world) -> Callable[..., dict[str, Any]]:
    """outcome(case, steps): merged over ranks; those of one process are remembered."""
    remembered: dict[tuple[Case, int], dict[str, Any]] = {}

    def run(case: Case, steps: int = 3) -> dict[str, Any]:
        if (case, steps) in remembered:
            return remembered[case, steps]
        ranks = run_ranks(train_steps, case.size, case, world["make_batch"], steps)
        merged = dict(ranks[0])
        merged["state"] = {name: x for other in ranks for name, x in other["state"].items()}
        for other in ranks:
            assert other["results"] == ranks[0]["results"], "ranks report different losses or norms"
            assert other["eval"] == ranks[0]["eval"]
            for name, x in other["state"].items():
                assert torch.equal(x, merged["state"][name]), f"ranks differ in {name}"
        if case.size == 1:
            remembered[case, steps] = merged
        return merged

    return run


def check(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1.0) -> None:
    first, expected = ours["results"][0], theirs["results"][0]
    assert expected.grad_norm > 0.5, "clipping takes part in what is compared"
    assert first.loss == pytest.approx(expected.loss, abs=1e-6 * tolerance)
    assert first.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6 * tolerance)
    assert ours["eval"] == pytest.approx(theirs["eval"], abs=1e-6 * tolerance)
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, gradient in theirs["gradients"].items():
        error = float((ours["gradients"][name] - gradient).norm() / gradient.norm())
        assert error < 1e-5 * tolerance, f"gradient of {name}: {error:.1e}"
    for mine, other in zip(ours["results"], theirs["results"], strict=True):
        assert mine.problem is None
        assert mine.loss == pytest.approx(other.loss, abs=1e-5 * tolerance)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-5 * tolerance)
        for name in other.extra:
            assert torch.allclose(torch.tensor(mine.extra[name]), torch.tensor(other.extra[name]), rtol=1e-2, atol=1e-4), name
    assert ours["state"].keys() == theirs["state"].keys()
    for name, x in theirs["state"].items():
        error = (ours["state"][name] - x).abs().max()
        assert float(error) < 1e-5 * tolerance, f"{name} after the steps: {error:.1e}"
    ignored = {"lr"}
    for mine, other in zip(ours["groups"], theirs["groups"], strict=True):
        assert {k: v for k, v in mine.items() if k not in ignored} == {k: v for k, v in other.items() if k not in ignored}


CASES = {
    "one process, zero 0": Case(0, micro_batch=1),
    "one process, zero 3": Case(3, checkpointing="layer"),
    "zero 0, cp2": Case(0, cp=2),
    "zero 1, cp2, ulysses, tied": Case(1, cp=2, attention="ulysses", tie=True),
    "zero 2, cp2, token_ring": Case(2, cp=2, attention="token_ring", micro_batch=1),
    "zero 3, cp2, tied, checkpointing": Case(3, cp=2, tie=True, checkpointing="layer", micro_batch=2),
    "zero 3, dp2, small parameters stay whole": Case(3, dp=2, persist=True),
    "zero 3, cp3, all_gather, hybrid": Case(3, cp=3, attention="all_gather", pattern=HYBRID),
    "zero 2, cp2 dp2, contiguous": Case(2, cp=2, dp=2, layout="contiguous", length=103),
    "zero 1, offload": Case(1, cp=2, offload="optimizer"),
    "zero 3, offload": Case(3, cp=2, offload="optimizer param"),
    "experts: zero 0, cp2 ep2": Case(0, cp=2, ep=2, pattern=MIXED),
    "experts: zero 1, cp2 ep2": Case(1, cp=2, ep=2, pattern=MIXED, micro_batch=2),
    "experts: zero 3, cp2 dp2 ep2, checkpointing": Case(3, cp=2, dp=2, ep=2, pattern=MIXED, checkpointing="layer"),
    "pp2 cp2, token_ring, given cut": Case(1, pp=2, cp=2, attention="token_ring", pattern="*-W|-"),
    "pp2 dp2, zero 0, balanced, tied": Case(0, pp=2, dp=2, layout="balanced", tie=True, micro_batch=1),
    "pp2, tied, checkpointing, lengths differ": Case(1, pp=2, tie=True, checkpointing="layer", mixed=True, micro_batch=2),
    "pp3": Case(1, pp=3, length=103, micro_batch=1),
    "experts: pp2 dp2 ep2": Case(1, pp=2, dp=2, ep=2, pattern=MIXED),
    "tp2, zero 1": Case(1, tp=2),
    "tp2 cp2, zero 3, experts ep2": Case(3, tp=2, cp=2, ep=2, pattern=MIXED),
    "tp2 dp2, zero 2, experts etp2": Case(2, tp=2, dp=2, etp=2, pattern=MIXED),
    "tp2 pp2, zero 1, tied": Case(1, tp=2, pp=2, tie=True, length=103),
    "tp2, zero 0, odd vocabulary": Case(0, tp=2, vocab=61),
    "tp2 cp2, zero 3, odd vocabulary": Case(3, tp=2, cp=2, vocab=61),
    "tp2 pp2, zero 1, odd vocabulary, tied": Case(1, tp=2, pp=2, vocab=61, tie=True),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_torch_engine(outcome, name: str) -> None:
    case = CASES[name]
    check(outcome(case), outcome(case.reference()))


def test_bf16_is_that_of_the_torch_engine(outcome) -> None:
    """Layers cast, so that DeepSpeed reduces fp32 gradients and steps fp32 weights."""
    check(outcome(Case(3, cp=2, dtype="bf16")), outcome(Case(None, cp=2, dtype="bf16")))


def relay(rank: int, size: int, cases: list[Case], folder: str, make_batch: Callable) -> list[StepResult]:
    """One optimizer step under each case in turn, handed on in checkpoints."""
    store = CheckpointStore(folder, keep_last=len(cases) + 1)
    results = []
    for step, case in enumerate(cases):
        engine, mesh = make(case, rank, size)
        if step:
            state = engine.state()
            store.load(store.folder / f"step-{step:08d}", state)
            engine.load_state(state)
        batch = make_batch(case, mesh, step)
        results.append(train_step(engine, batch, count_targets(batch, mesh), 1e-3))
        store.save(step + 1, engine.state(), {})
    return results


@pytest.mark.parametrize(
    "cases",
    [
        [Case(3, cp=2), Case(None, cp=2), Case(1, pp=2), Case(2, dp=2), Case(None, dp=2), Case(0, pp=2), Case(3, tp=2)],
        [
            Case(3, cp=2, dp=2, ep=2, pattern=MIXED),
            Case(1, tp=2, pp=2, ep=2, pattern=MIXED),
            Case(None, cp=2, dp=2, ep=4, pattern=MIXED),
            Case(2, tp=2, cp=2, etp=2, pattern=MIXED),
        ],
    ],
    ids=["dense", "experts"],
)
def test_checkpoints_are_for_every_engine_and_layout(outcome, world, tmp_path, cases: list[Case]) -> None:
    results = run_ranks(relay, cases[0].size, cases, str(tmp_path), world["make_batch"])[0]
    expected = outcome(cases[0].reference(), len(cases))["results"]
    for mine, other in zip(results, expected, strict=True):
        assert mine.loss == pytest.approx(other.loss, abs=1e-5)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)


def spoiled_step(rank: int, size: int, case: Case, make_batch: Callable) -> tuple[list[StepResult], dict[str, Tensor]]:
    """A step with a weight that is not finite, then the weights restored and a step."""
    engine, mesh = make(case, rank, size)
    batch = make_batch(case, mesh, 0)
    targets = count_targets(batch, mesh)
    good, bad = engine.state(), engine.state()
    bad["model"]["norm.weight"] = bad["model"]["norm.weight"] * torch.nan
    engine.load_state(bad)
    spoiled = train_step(engine, batch, targets, 1e-3)
    engine.load_state(good)
    return [spoiled, train_step(engine, batch, targets, 1e-3)], flat_state(engine)


@pytest.mark.parametrize("case", [Case(1, cp=2), Case(2, cp=2), Case(3, cp=2), Case(3, cp=2, offload="optimizer")])
def test_what_is_not_finite_leaves_nothing_behind(outcome, world, case: Case) -> None:
    results, state = run_ranks(spoiled_step, 2, case, world["make_batch"])[0]
    assert "first not finite on rank 0, sample 0" in results[0].problem
    expected = outcome(case.reference(), 1)
    assert results[1].loss == pytest.approx(expected["results"][0].loss, abs=1e-6)
    for name, x in expected["state"].items():
        assert float((state[name] - x).abs().max()) < 1e-6, name
