"""Balancing losses against their definitions, and what they do to a router."""

import pytest
import torch

from lctrain.config.moe import BalanceConfig
from lctrain.models.moe.balance import balance_loss, count
from lctrain.models.moe.router import Routing
from lctrain.models.moe.stats import forget_statistics, gather_statistics, update_biases
from lctrain.models.moe.tokens import local_tokens
from lctrain.models.parallel import ModelParallel
from lctrain.parallel.group import RankGroup
from tests.unit.moe.problem import D_MODEL, LENGTH, documents_of, make_moe, real_mask, sequence, settings

TOKENS = 21 + 17
ONE = (RankGroup(), RankGroup())


def routing(seed: int = 0, experts: int = 6, k: int = 2) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, experts, generator=generator, dtype=torch.float64, requires_grad=True)
    shares = logits.softmax(-1)
    return Routing(shares.topk(k).indices, shares.topk(k).values, shares, logits)


def loss(config: BalanceConfig, found: Routing) -> torch.Tensor:
    tokens = local_tokens(sequence(), LENGTH, 0, torch.device("cpu"))
    value = balance_loss(config, found, tokens, ONE, RankGroup())
    assert value is not None
    return value


def even(found: Routing, of: slice) -> torch.Tensor:
    """E * sum f P over some tokens, by definition."""
    experts, k = found.shares.shape[1], found.experts.shape[1]
    chosen = torch.zeros_like(found.shares).scatter(1, found.experts, 1.0)[of]
    return experts * (chosen.mean(0) / k * found.shares[of].mean(0)).sum()


def test_definitions() -> None:
    found = routing()
    everything = slice(0, TOKENS)
    assert torch.allclose(loss(BalanceConfig(switch=0.7), found), 0.7 * even(found, everything))
    assert torch.allclose(loss(BalanceConfig(switch=0.0, global_batch=0.7), found), 0.7 * even(found, everything))
    z = found.logits.logsumexp(-1).square().mean()
    assert torch.allclose(loss(BalanceConfig(switch=0.0, z_loss=0.3), found), 0.3 * z)
    at, documents = 0, torch.zeros((), dtype=torch.float64)
    for _, start, end in documents_of():
        documents = documents + (end - start) / TOKENS * even(found, slice(at, at + end - start))
        at += end - start
    assert torch.allclose(loss(BalanceConfig(switch=0.0, sequence=0.2), found), 0.2 * documents)
    together = BalanceConfig(switch=0.7, sequence=0.2, z_loss=0.3)
    assert torch.allclose(loss(together, found), 0.7 * even(found, everything) + 0.2 * documents + 0.3 * z)


def test_no_losses_is_none_and_even_use_costs_one() -> None:
    tokens = local_tokens(sequence(), LENGTH, 0, torch.device("cpu"))
    assert balance_loss(BalanceConfig(switch=0.0, bias_rate=1.0), routing(), tokens, ONE, RankGroup()) is None
    shares = torch.full((TOKENS, 2), 0.5)
    evenly = Routing(torch.arange(TOKENS)[:, None] % 2, shares[:, :1], shares, shares.log())
    assert float(loss(BalanceConfig(switch=1.0), evenly)) == pytest.approx(1)


def test_counts() -> None:
    assert count(torch.tensor([3, 0, 3, 1]), 5).tolist() == [1, 1, 0, 2, 0]
    assert count(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_the_gradient_of_the_loss_reaches_the_router_alone() -> None:
    layer = make_moe(settings(balance={"switch": 0.5, "sequence": 0.3, "z_loss": 0.1}))
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    out = layer(x, sequence(side_loss_scale=3.0))
    (out * 0).sum().backward()
    own = x.detach()[real_mask()].requires_grad_()
    plain = layer.router(own, torch.zeros(TOKENS).long(), None, None)
    value = 3.0 * loss(layer.settings.balance, plain)
    dx, dweight = torch.autograd.grad(value, (own, layer.router.weight))
    assert torch.allclose(layer.router.weight.grad, dweight, atol=1e-13)
    assert torch.allclose(x.grad[real_mask()], dx, atol=1e-13)
    assert not layer.experts.up.grad.any()


def step(layer, x: torch.Tensor) -> dict:
    layer(x, sequence()).sum().backward()
    extra = gather_statistics(layer, ModelParallel())
    update_biases(layer)
    forget_statistics(layer)
    return extra


def test_metrics() -> None:
    layer = make_moe(settings(capacity_factor=0.5, balance={"switch": 0.5}))
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    extra = step(layer, x)
    own = layer.router(x[real_mask()], torch.zeros(TOKENS).long(), None, None)
    counts = torch.bincount(own.experts.flatten(), minlength=8).double()
    assert extra["moe_load"][0] == pytest.approx((counts / counts.sum()).tolist(), abs=1e-3)
    assert extra["moe_max_violation"] == pytest.approx([float(counts.max() / counts.mean()) - 1], rel=1e-3)
    entropy = -(own.shares * own.shares.log()).sum(-1).mean()
    assert extra["moe_entropy"] == pytest.approx([float(entropy.detach())], rel=1e-3)
    assert 0 < extra["moe_dropped"][0] < 1
    assert "moe_bias" not in extra
    assert extra["moe_balance_loss"] == pytest.approx([float(loss(layer.settings.balance, own).detach())], rel=1e-3)


def test_padding_and_evaluation_do_not_count() -> None:
    layer = make_moe(settings())
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    with torch.no_grad():
        layer(x, sequence())
    assert layer.balancer.sums is None
    layer(x, sequence()).sum().backward()
    assert float(layer.balancer.sums[:8].sum()) == 2 * TOKENS


def test_biases_even_out_the_use_of_experts() -> None:
    layer = make_moe(settings(router={"score": "sigmoid"}, balance={"bias_rate": 0.01}))
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    x += 0.5 * layer.router.weight[:2].sum(0).detach()  # the first two are everybody's favourites
    violations = [step(layer, x)["moe_max_violation"][0] for _ in range(150)]
    assert violations[0] > 1
    assert min(violations[-10:]) < 0.5
    assert "balancer.bias" in layer.state_dict()
    assert layer.balancer.bias.abs().max() > 0
