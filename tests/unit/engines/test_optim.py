"""Learning rate, decay groups, gradient norm."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lctrain.config.model import AttentionConfig, ModelConfig
from lctrain.config.optim import OptimConfig, ScheduleConfig
from lctrain.launch.ranks import run_ranks
from lctrain.models.model import LanguageModel
from lctrain.models.parallel import ModelParallel
from lctrain.optim import global_grad_norm, learning_rate, make_adamw, scale_gradients

PEAK = 2e-3


def curve(kind: str, steps: int = 100, **schedule: object) -> list[float]:
    config = OptimConfig(lr=PEAK, schedule=ScheduleConfig(kind=kind, **schedule))
    return [learning_rate(config, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_linearly_to_the_peak(kind: str) -> None:
    rates = curve(kind, warmup_steps=10)
    assert rates[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert max(rates) == pytest.approx(PEAK)
    assert min(rates) > 0, "no step is wasted with a rate of zero"


def test_cosine() -> None:
    rates = curve("cosine", warmup_steps=20, min_ratio=0.1)
    assert rates[19] == pytest.approx(PEAK)
    assert rates[59] == pytest.approx(PEAK * (0.1 + 0.9 / 2)), "half-way between warm-up and end"
    assert rates[39] == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rates[-1] == pytest.approx(PEAK * 0.1)
    assert rates[19:] == sorted(rates[19:], reverse=True)


def test_linear() -> None:
    rates = curve("linear", warmup_steps=20, min_ratio=0.0)
    assert rates[59] == pytest.approx(PEAK / 2)
    assert rates[-1] == pytest.approx(0, abs=1e-18)
    assert [a - b for a, b in itertools.pairwise(rates[19:])] == pytest.approx([PEAK / 80] * 80)


def test_wsd_stays_flat_then_falls_linearly() -> None:
    rates = curve("wsd", warmup_steps=10, min_ratio=0.2, decay_fraction=0.25)
    assert rates[9:75] == pytest.approx([PEAK] * 66)
    assert rates[75] < PEAK
    assert rates[-1] == pytest.approx(PEAK * 0.2)
    assert [a - b for a, b in itertools.pairwise(rates[74:])] == pytest.approx([PEAK * 0.8 / 25] * 25)


def test_constant() -> None:
    assert curve("constant", steps=5) == [PEAK] * 5


def test_wsd_without_decay_is_constant() -> None:
    assert curve("wsd", decay_fraction=0.0) == pytest.approx([PEAK] * 100)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_longer_than_the_run(kind: str) -> None:
    assert curve(kind, steps=5, warmup_steps=50) == pytest.approx([PEAK * (step + 1) / 50 for step in range(5)])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step(kind: str, warmup: int) -> None:
    (rate,) = curve(kind, steps=1, warmup_steps=warmup)
    assert rate == pytest.approx(PEAK if warmup else PEAK * 0.1)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_beyond_the_last_step_the_rate_stays_low(kind: str) -> None:
    config = OptimConfig(lr=PEAK, schedule=ScheduleConfig(kind=kind, min_ratio=0.1))
    assert learning_rate(config, 150, 100) == pytest.approx(PEAK * 0.1)


def test_matrices_decay_and_vectors_do_not() -> None:
    attention = AttentionConfig(bias=True, out_bias=True, qk_norm=True, sinks=True)
    model = LanguageModel(ModelConfig(pattern="*-", d_model=16, vocab_size=11, attention=attention))
    optimizer = make_adamw(model, OptimConfig(lr=PEAK, beta1=0.8, beta2=0.9, eps=1e-7, weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays, spared = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert decays | spared == set(names.values())
    assert not decays & spared
    vectors = {name for name in names.values() if "norm" in name or name.endswith(("bias", "sinks"))}
    assert spared == vectors
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-7)


def test_decay_is_decoupled_from_the_gradient() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = make_adamw(layer, OptimConfig(lr=0.1, weight_decay=0.5))
    layer.weight.grad, layer.bias.grad = torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)
    bias = layer.bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias.detach(), bias)


def make_gradients() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 7), torch.randn(7), torch.randn(3, 5)]


def exact_norm() -> float:
    return float(torch.cat([gradient.double().flatten() for gradient in make_gradients()]).norm())


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 5, bias=False), nn.LayerNorm(7, bias=False), nn.Linear(5, 3, bias=False))


def test_norm_of_whole_gradients() -> None:
    model = make_model()
    for parameter, gradient in zip(model.parameters(), make_gradients(), strict=True):
        parameter.grad = gradient
    norm = global_grad_norm(model, ModelParallel())
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(exact_norm(), rel=1e-6)
    scale_gradients(model.parameters(), 0.5)
    assert float(global_grad_norm(model, ModelParallel())) == pytest.approx(exact_norm() / 2, rel=1e-6)


def test_norm_of_no_gradients() -> None:
    assert float(global_grad_norm(make_model(), ModelParallel())) == 0


def test_norm_of_a_broken_gradient_is_not_finite() -> None:
    model = make_model()
    for value in (math.nan, math.inf):
        model[1].weight.grad = torch.tensor([1.0] * 6 + [value])
        assert not math.isfinite(float(global_grad_norm(model, ModelParallel())))


def sharded_norm(rank: int, world_size: int, shard_all: bool) -> tuple[float, float]:
    """Norm before and after halving; with shard_all=False one layer stays whole on every rank."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    model, mesh = make_model(), init_device_mesh("cpu", (world_size,))
    for layer in model if shard_all else (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    for parameter, gradient in zip(model.parameters(), make_gradients(), strict=True):
        sharded = isinstance(parameter, DTensor)
        parameter.grad = distribute_tensor(gradient, mesh, parameter.placements) if sharded else gradient
    before = float(global_grad_norm(model, ModelParallel()))
    scale_gradients(model.parameters(), 0.5)
    return before, float(global_grad_norm(model, ModelParallel()))


@pytest.mark.parametrize("shard_all", [True, False])
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_gradients_count_once(ranks: int, shard_all: bool) -> None:
    """Four ranks leave some without a row of the smallest matrix."""
    for before, after in run_ranks(sharded_norm, ranks, shard_all):
        assert before == pytest.approx(exact_norm(), rel=1e-6)
        assert after == pytest.approx(exact_norm() / 2, rel=1e-6)
