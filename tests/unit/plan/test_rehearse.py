"""A rehearsal on tensors without data counts exactly what the same code does on real ones."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lctrain.config.launcher import LauncherConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig, RouterConfig
from lctrain.config.schema import CorpusConfig, DataConfig, EngineConfig, ParallelConfig, TrainConfig, TrainerConfig
from lctrain.errors import UserError
from lctrain.kernels.attention import fused
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.mesh import ProcessMesh
from lctrain.plan.cost import PartCost
from lctrain.plan.counted_group import counted
from lctrain.plan.counting import CostCounter
from lctrain.plan.rehearse import Rehearsal, build, make_sequence, rehearse
from tests.mixers import MIXERS

LENGTH = 96


def config(
    pattern: str = "*W-M+LE", dtype: str = "fp32", checkpointing: str = "none", micro_batch: int = 1, **moe
) -> TrainConfig:
    return TrainConfig(
        run_dir="unused",
        model=ModelConfig(
            pattern=pattern,
            d_model=32,
            vocab_size=61,
            attention=AttentionConfig(n_heads=4, n_kv_heads=2, window=20, qk_norm=True, bias=True),
            mlp=MlpConfig(d_ff=48),
            **MIXERS,
            moe=MoeConfig(
                **{
                    "n_experts": 4,
                    "d_ff": 24,
                    "shared_d_ff": 16,
                    "shared_gate": True,
                    "balance": BalanceConfig(switch=1e-2, z_loss=1e-3, bias_rate=1e-3),
                    **moe,
                }
            ),
        ),
        data=DataConfig(corpora=(CorpusConfig(prefix="unused"),)),
        parallel=ParallelConfig(),
        engine=EngineConfig(dtype=dtype, activation_checkpointing=checkpointing, device="cpu"),
        trainer=TrainerConfig(seq_len=LENGTH, global_batch=2, micro_batch=micro_batch, z_loss=1e-4, loss_chunk=40),
        launcher=LauncherConfig(processes=1),
    )


def real(settings: TrainConfig) -> dict[str, PartCost]:
    """The same parts on tensors with data, experts as grouped products, which is how they are planned."""
    groups = ProcessMesh(0).make_groups()
    counter = CostCounter()
    groups = counted(groups, counter)
    seq = make_sequence(settings, groups, settings.trainer.seq_len, torch.device("cpu"))
    torch.manual_seed(0)
    fused._mask.cache_clear()  # a plan does not know what ran before
    with patch("lctrain.kernels.routed_mlp.blocked.suits", lambda x: False):
        model = build(settings, groups, torch.device("cpu"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        return Rehearsal(settings, model, seq, counter).parts()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_all_but_mixtures_equal_a_real_run(dtype, checkpointing):
    """Every kernel with its bytes, memory kept and most held: the same to the byte."""
    settings = config("*W-M+L", dtype, checkpointing, micro_batch=2)
    assert rehearse(settings, on_cuda=False) == real(settings)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("top_k", "capacity"), [(1, None), (2, None), (2, 4.0)])
def test_mixtures_equal_a_real_run(dtype, top_k, capacity):
    """Grouped products count as one kernel for all experts; with few rows the CPU pads them."""
    settings = config("E-", dtype, top_k=top_k, d_ff=16, capacity_factor=capacity)
    planned, found = rehearse(settings, on_cuda=False)["E"], real(settings)["E"]
    assert planned.kept == found.kept
    for ours, theirs in ((planned.forward, found.forward), (planned.backward, found.backward)):
        products = [{o for o in cost.operations if "grouped" in o.name} for cost in (ours, theirs)]
        assert products[0] == products[1]
        assert ours.peak <= theirs.peak < 1.05 * ours.peak


def test_kept_is_what_autograd_saves():
    """By another way: distinct storages that saved_tensors_hooks see, without weights and what all layers share."""
    settings = config("*W-+", "bf16")
    planned = rehearse(settings, on_cuda=False)
    groups = ProcessMesh(0).make_groups()
    seq = make_sequence(settings, groups, LENGTH, torch.device("cpu"))
    model = build(settings, groups, torch.device("cpu"))
    for layer, symbol in zip(model.layers, "*W-+", strict=True):
        x = torch.randn(1, LENGTH, 32, dtype=torch.bfloat16, requires_grad=True)
        with torch.no_grad():
            layer(x, seq)  # makes what layers share
        others = [*model.parameters(), *(t for made in seq._made.values() if isinstance(made, tuple) for t in made)]
        excluded = {t.untyped_storage()._cdata for t in others}
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved=saved, excluded=excluded) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in excluded:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = layer(x, seq)
        assert sum(saved.values()) == planned[symbol].kept, symbol
        del y


def test_kept_on_a_gpu_by_hand():
    """There the norm widens its input and keeps the copy: the input itself is free again when the layer is through."""
    n, d, f, half, full = LENGTH, 32, 48, 2, 4
    norm = n * d * full + n * full + d * full  # the wide input, one number per token, the rounded weight
    matrices = 2 * f * d * half  # bf16 copies of gate and up
    assert rehearse(config("-", "bf16"))["-"].kept == norm + n * d * half + matrices + 2 * n * f * half


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
def test_flops_equal_torchs_counter(checkpointing):
    """On a real run; and what mixers state about themselves, but for attention's kernel and the rounding of chunks."""
    settings = config("*-M+L", checkpointing=checkpointing)
    planned = rehearse(settings, on_cuda=False)
    groups = ProcessMesh(0).make_groups()
    seq = make_sequence(settings, groups, LENGTH, torch.device("cpu"))
    model = build(settings, groups, torch.device("cpu"))
    documents = ((0, LENGTH),)
    for layer, symbol in zip(model.layers, "*-M+L", strict=True):
        x = torch.randn(1, LENGTH, 32, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            y = model.through(layer, x, seq)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        assert (planned[symbol].forward.flops, planned[symbol].backward.flops) == (
            forward.get_total_flops(),
            backward.get_total_flops(),
        ), symbol
        if symbol == "-":
            assert planned[symbol].forward.flops == layer.mixer.flops(documents)
        if symbol == "*":
            kernel = 4 * 32 * AttentionMask(documents).total_entries(LENGTH)
            assert planned[symbol].forward.flops == layer.mixer.flops(documents) - kernel
    assert planned["loss"].forward.flops == 3 * 2 * LENGTH * 32 * 61, "logits, and both gradients while they are at hand"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"capacity_factor": 1.25},
        {"router": RouterConfig(tasks=2, jitter=0.01)},
        {"router": RouterConfig(score="sigmoid", groups=2, top_groups=1)},
        {"activation": "gelu", "shared_d_ff": 0, "shared_gate": False},
    ],
    ids=str,
)
def test_as_on_a_gpu(dtype, moe):
    """All mixers with their variants, with checkpointing: attention in one kernel, no copies of it in fp32, norms in one."""
    settings = config("*W-M+LE", dtype, "layer", **moe)
    planned = rehearse(settings)
    names = {operation.name for operation in planned["-"].forward.operations}
    assert "aten._fused_rms_norm" in names
    assert "aten.rsqrt_" not in names
    on_cpu = rehearse(settings, on_cuda=False)
    for name, part in planned.items():
        assert part.forward.flops == on_cpu[name].forward.flops, name
        assert part.backward.flops == on_cpu[name].backward.flops, name
        assert part.forward.peak > 0, name
    assert planned["*"].kept == LENGTH * 32 * (4 if dtype == "fp32" else 2), "the input alone"
    assert not torch.zeros(1).is_cuda


def test_refused():
    with pytest.raises(UserError, match=r"capacity_factor=0\.5"):
        rehearse(config("E", capacity_factor=0.5))
