"""What a rehearsal says that one rank of many keeps, holds, computes and sends, against real ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig, RoutedHeadsConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.kernels.attention import fused
from lctrain.launch.ranks import run_ranks
from lctrain.models import megatron_layers as _imported_before_ranks_are_forked  # noqa: F401
from lctrain.models.moe.router import Router
from lctrain.models.moe.tokens import Tokens
from lctrain.parallel.mesh import MeshGroups
from lctrain.plan.cost import Operation, PartCost, PassCost
from lctrain.plan.counted_group import counted, direct_dimensions
from lctrain.plan.counting import CostCounter
from lctrain.plan.rehearse import Rehearsal, build, make_sequence, rehearse
from tests.mixers import MIXERS


@dataclasses.dataclass(frozen=True)
class Case:
    engine: str = "torch"
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    pattern: str = "*W-M+L"
    dtype: str = "fp32"
    checkpointing: str = "none"
    attention: str = "ring"
    length: int = 128
    kv_heads: int = 2
    micro_batch: int = 1
    routed_heads: bool = False

    def config(self) -> TrainConfig:
        routed = RoutedHeadsConfig(shared=2, top_k=1, balance=1e-2) if self.routed_heads else None
        attention = AttentionConfig(
            n_heads=4, n_kv_heads=self.kv_heads, window=20, qk_norm=True, bias=True, sinks=True, routed_heads=routed
        )
        return TrainConfig(
            run_dir="unused",
            model=ModelConfig(
                pattern=self.pattern,
                d_model=32,
                vocab_size=61,
                attention=attention,
                mlp=MlpConfig(d_ff=48),
                **MIXERS,
                moe=MoeConfig(
                    n_experts=4,
                    top_k=2,
                    d_ff=16,
                    shared_d_ff=16,
                    shared_gate=True,
                    balance=BalanceConfig(switch=1e-2, z_loss=1e-3, bias_rate=1e-3, sequence=1e-3, global_batch=1e-3),
                ),
            ),
            data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
            parallel=ParallelConfig(cp=self.cp, tp=self.tp, ep=self.ep, etp=self.etp, attention=self.attention),
            engine=EngineConfig(name=self.engine, dtype=self.dtype, activation_checkpointing=self.checkpointing, device="cpu"),
            trainer=TrainerConfig(
                seq_len=self.length,
                global_batch=4 * self.micro_batch,
                micro_batch=self.micro_batch,
                z_loss=1e-4,
                loss_chunk=40,
            ),
            launcher=LauncherConfig(processes=self.cp * self.tp),
        )


def evenly(tokens: Tokens, scores: Tensor) -> Tensor:
    """Scores by which tokens use all experts alike."""
    n, experts = scores.shape
    best = (torch.arange(2 * n) % experts).view(n, 2)
    return torch.zeros_like(scores).scatter_(1, best, 1.0)


@contextlib.contextmanager
def directly() -> Iterator[Counter[str]]:
    """Counts the bytes that megatron-core's mappings give to torch.distributed, by collective."""
    found: Counter[str] = Counter()

    def reduce(tensor: Tensor, group: Any) -> Tensor:
        found["all_reduce"] += tensor.nbytes
        return real[0](tensor, group)

    def gather(into: Tensor, tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        found["all_gather"] += tensor.nbytes * (group.size() - 1)
        return real[1](into, tensor, *args, group=group, **kwargs)

    def scatter(into: Tensor, tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        found["reduce_scatter"] += into.nbytes * (group.size() - 1)
        return real[2](into, tensor, *args, group=group, **kwargs)

    real = mappings._reduce, mappings.dist_all_gather_func, mappings.dist_reduce_scatter_func
    with (
        patch.object(mappings, "dist_all_gather_func", gather),
        patch.object(mappings, "dist_reduce_scatter_func", scatter),
        patch.object(mappings, "_reduce", reduce),
    ):
        yield found


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Gloo's threads let go of a message's tensors a moment after it has arrived: waits give them that moment."""
    wait = dist.Work.wait

    def wait_longer(*args: Any) -> Any:
        done = wait(*args)
        time.sleep(0.002)
        return done

    with patch.object(dist.Work, "wait", wait_longer):
        yield


class Watched(Rehearsal):
    """Notes what RankGroup and megatron-core's mappings say was handed over in every part, by dimension."""

    def __init__(self, *args: Any, groups: MeshGroups, direct: Counter[str]) -> None:
        super().__init__(*args)
        self.groups, self.direct = groups, direct
        self.handed: dict[str, dict[str, int]] = {}

    def _part(self, name: str, layer: Any) -> PartCost:
        before = self._total()
        part = super()._part(name, layer)
        self.handed[name] = dict(self._total() - before)
        return part

    def _total(self) -> Counter[str]:
        names = [field.name for field in dataclasses.fields(MeshGroups)]
        total = Counter({name: sum(getattr(self.groups, name).sent.values()) for name in names})
        total["tp"] += sum(self.direct.values())
        return total


def real_parts(rank: int, size: int, case: Case) -> dict[str, Any]:
    """Parts as counted on real tensors among real ranks, and what was handed over in the course of each."""
    config = case.config()
    plain = config.mesh(rank, size).make_groups()
    counter = CostCounter(direct_dimensions(plain))
    groups = counted(plain, counter)
    seq = make_sequence(config, groups, case.length, torch.device("cpu"))
    torch.manual_seed(0)
    fused._mask.cache_clear()
    with patch("lctrain.kernels.routed_mlp.blocked.suits", lambda x: False), directly() as direct, settled():
        model = build(config, groups, torch.device("cpu"))
        for module in model.modules():
            if isinstance(module, Router):
                module.settle = evenly
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        rehearsal = Watched(config, model, seq, counter, groups=groups, direct=direct)
        gc.disable()  # what lives until Python looks for circles of references would be found here: there is nothing
        try:
            return {"parts": rehearsal.parts(), "handed": rehearsal.handed}
        finally:
            gc.enable()


CASES = [
    Case(cp=2),
    Case(cp=2, pattern="*M+", dtype="bf16", checkpointing="layer"),
    Case(cp=2, attention="token_ring", pattern="*W"),
    Case(cp=4, attention="usp", pattern="*W+-", kv_heads=4),
    Case(cp=2, pattern="WL-", length=101, micro_batch=2),
    Case("megatron", tp=2),
    Case("megatron", tp=2, pattern="*M-", dtype="bf16", length=101, checkpointing="layer", kv_heads=1),
    Case("megatron", tp=2, cp=2, pattern="*M-"),
    Case("deepspeed", tp=2, pattern="*-", dtype="bf16"),
    Case(cp=2, ep=2, pattern="E*", routed_heads=True, micro_batch=2),
    Case("megatron", cp=2, tp=2, ep=2, etp=2, pattern="E-", dtype="bf16"),
]


def short(case: Case) -> str:
    default = Case()
    return ",".join(f"{k}={v}" for k, v in dataclasses.asdict(case).items() if v != getattr(default, k))


def kernels(cost: PassCost) -> set[Operation]:
    """Without copies: gloo makes some of its own when it scatters sums."""
    return {operation for operation in cost.operations if operation.name != "aten.copy_"}


@pytest.mark.parametrize("case", CASES, ids=short)
def test_equal_to_real_ranks(case):
    planned = rehearse(case.config(), on_cuda=False)
    found = run_ranks(real_parts, case.cp * case.tp, case)[0]
    for name, part in found["parts"].items():
        assert planned[name].kept == part.kept, name
        for way in ("forward", "backward"):
            ours, real = getattr(planned[name], way), getattr(part, way)
            assert ours.sent == real.sent, (name, way)
            assert ours.flops == real.flops, (name, way)
            assert ours.peak == real.peak, (name, way)
            if name != "E":
                assert kernels(ours) == kernels(real), (name, way)
        assert handed_over(planned[name]) == found["handed"][name], name


def handed_over(part: PartCost) -> dict[str, int]:
    """Bytes by dimension, as RankGroup counts them in groups of two, where sums send as much as they have."""
    total: Counter[str] = Counter()
    for sent in (*part.forward.sent, *part.backward.sent):
        total[sent.dimension] += sent.bytes
    return dict(total)
