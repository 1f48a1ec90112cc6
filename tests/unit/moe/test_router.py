"""Choice and weights: normalisation, groups, bias, noise."""

import pytest
import torch

from lctrain.config.moe import RouterConfig
from lctrain.models.moe.jitter import jitter_factors
from lctrain.models.moe.router import choose
from lctrain.models.moe.tokens import local_tokens
from tests.unit.moe.problem import D_MODEL, LENGTH, make_moe, sequence, settings


def logits(n: int = 4000, experts: int = 8) -> torch.Tensor:
    return torch.randn(n, experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_renormalised_softmax_is_softmax_of_the_chosen() -> None:
    x = logits()
    routing = choose(x, 3, RouterConfig())
    chosen = x.topk(3, dim=-1)
    assert torch.equal(routing.experts, chosen.indices)
    assert torch.allclose(routing.weights, chosen.values.softmax(-1), atol=1e-14)
    plain = choose(x, 3, RouterConfig(renormalise=False))
    assert torch.allclose(plain.weights, x.softmax(-1).gather(1, chosen.indices))
    assert float(plain.weights.sum(-1).max()) < 1, "another function"


def test_a_bias_chooses_and_does_not_weigh() -> None:
    x, bias = logits(), torch.tensor([5.0, 0, 0, 0, 0, 0, 0, -5.0])
    routing = choose(x, 2, RouterConfig(score="sigmoid", renormalise=False), bias)
    assert (routing.experts == 0).any(-1).all()
    assert not (routing.experts == 7).any()
    assert torch.allclose(routing.weights, x.sigmoid().gather(1, routing.experts))


@pytest.mark.parametrize("rule", ["top2_sum", "top_k_over_groups", "max"])
def test_experts_lie_in_the_best_groups(rule: str) -> None:
    config = RouterConfig(groups=4, top_groups=2, group_score=rule)
    x = logits(500, 16)
    routing = choose(x, 6, config)
    scores = x.softmax(-1).unflatten(1, (4, 4))
    best = {"top2_sum": 2, "top_k_over_groups": 3, "max": 1}[rule]
    group = scores.sort(-1, descending=True).values[..., :best].sum(-1)
    for token in range(len(x)):
        allowed = set(group[token].sort(descending=True).indices[:2].tolist())
        assert set((routing.experts[token] // 4).tolist()) <= allowed


@pytest.mark.parametrize(("k", "groups"), [(2, 2), (3, 2), (8, 2)])
def test_group_scores_are_different_functions(k: int, groups: int) -> None:
    """A third of the tokens: see the published implementations."""
    x = logits(experts=32)
    shape = {"score": "sigmoid", "groups": 4, "top_groups": groups if k % groups == 0 else 3}
    one, other = (choose(x, k, RouterConfig(**shape, group_score=rule)) for rule in ("top2_sum", "top_k_over_groups"))
    share = float((one.experts.sort().values != other.experts.sort().values).any(-1).double().mean())
    assert 0.05 < share < 0.6


def test_groups_that_are_closed_stay_closed_under_negative_scores() -> None:
    """A bias may make all open scores negative; masked ones must not win with 0."""
    routing = choose(logits(), 2, RouterConfig(score="sigmoid", groups=2, top_groups=1), torch.full((8,), -3.0))
    assert (routing.experts // 4 == routing.experts[:, :1] // 4).all()


def test_jitter_is_uniform_and_depends_on_the_token_alone() -> None:
    tokens = local_tokens(sequence(samples=(5, 9)), LENGTH, 0, torch.device("cpu"))
    factors = jitter_factors(tokens, 4096, 0.1)
    assert factors.shape == (21 + 17, 4096)
    assert float(factors.min()) >= 0.9
    assert float(factors.max()) <= 1.1
    assert abs(float(factors.mean()) - 1) < 1e-3
    assert float(factors.std()) == pytest.approx(0.1 / 3**0.5, rel=0.01)
    assert len(factors.flatten().unique()) > 0.99 * factors.numel()
    other = local_tokens(sequence(samples=(6, 9)), LENGTH, 0, torch.device("cpu"))
    changed = (jitter_factors(other, 16, 0.1) != jitter_factors(tokens, 16, 0.1)).any(-1)
    assert changed.tolist() == [True] * 21 + [False] * 17


def test_jitter_acts_in_training_alone() -> None:
    layer = make_moe(settings(router={"jitter": 0.5}))
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    noisy = layer(x, sequence())
    with torch.no_grad():
        quiet = layer(x, sequence())
    assert not torch.allclose(noisy, quiet)
    layer.eval()
    assert torch.equal(layer(x, sequence()), quiet)
