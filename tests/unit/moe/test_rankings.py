"""Pinned rankings: rounding decides nothing, real differences stay."""

import pytest
import torch

from lctrain.config.model import AttentionConfig, ModelConfig
from lctrain.config.moe import RoutedHeadsConfig, RouterConfig
from lctrain.models.model import LanguageModel
from lctrain.models.moe.rankings import Rankings
from lctrain.models.moe.router import choose
from tests.unit.moe.problem import D_MODEL, LENGTH, make_moe, sequence, settings


def ties(n: int) -> torch.Tensor:
    """Logits [n, 8] in steps of a half, so that nearly every token has ties among its best."""
    return (torch.randn(n, 8, generator=torch.Generator().manual_seed(0)) * 2).round() / 2


def noise(like: torch.Tensor, seed: int) -> torch.Tensor:
    return 1e-6 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fields", [{}, {"score": "sigmoid", "groups": 4, "top_groups": 2}], ids=str)
def test_rounding_decides_nothing(fields: dict, monkeypatch) -> None:
    layer = make_moe(settings(router=fields), torch.float32)
    seq, x = sequence(), torch.randn(2, LENGTH, D_MODEL)
    chosen: list[torch.Tensor] = []

    def run(rankings: Rankings | None, seed: int) -> torch.Tensor:
        def logits(own: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
            return ties(len(own)) + noise(ties(len(own)), seed)

        monkeypatch.setattr(layer.router, "_logits", logits)
        layer.router.settle = None
        if rankings is not None:
            rankings.attach(layer)
        layer(x, seq)
        tokens = seq._made[next(key for key in seq._made if "tokens" in key)]
        routing = layer.router(x.flatten(0, 1)[tokens.real], tokens.tasks, None, tokens)
        chosen.append(routing.experts)
        return routing.weights

    record = Rankings()
    first = run(record, 1)
    run(None, 2)
    pinned = run(Rankings(record.recorded()), 2)
    assert (chosen[1] != chosen[0]).any(), "there are ties, and rounding decides them"
    assert torch.equal(chosen[2], chosen[0])
    assert not torch.equal(pinned, first), "weights are those of its own scores"
    assert torch.allclose(pinned, first, atol=1e-5)


def test_scores_that_differ_stay() -> None:
    layer = make_moe(settings(), torch.float32)
    record, seq = Rankings(), sequence()
    record.attach(layer)
    layer(torch.randn(2, LENGTH, D_MODEL), seq)
    ((numbers, scores),) = record.recorded().values()
    assert len(numbers) == len(scores) == 21 + 17
    assert (numbers.diff() > 0).all()
    pinned, x = Rankings(record.recorded()), torch.randn(2, LENGTH, D_MODEL)
    plain = layer(x, seq)
    pinned.attach(layer)
    assert torch.equal(layer(x, seq), plain), "another input has other scores"
    pinned.part = "another part"
    assert torch.equal(layer(x, seq), plain), "of which nothing was recorded"


def test_recomputed_passes_are_recorded_once_and_padding_is_not() -> None:
    layer, record = make_moe(settings(), torch.float32), Rankings()
    record.attach(layer)
    x, seq = torch.randn(2, LENGTH, D_MODEL), sequence(samples=(7, 3))
    layer(x, seq)
    before = record.recorded()
    layer(x, seq)
    for key, tensors in record.recorded().items():
        assert all(torch.equal(one, two) for one, two in zip(tensors, before[key], strict=True))
        assert (tensors[0] >> 32).unique().tolist() == [3, 7]


def test_routed_heads_are_pinned_too() -> None:
    heads = AttentionConfig(n_heads=4, n_kv_heads=2, routed_heads=RoutedHeadsConfig(shared=1, top_k=2))
    model = LanguageModel(ModelConfig(pattern="*E*", d_model=16, vocab_size=8, attention=heads), torch.float32)
    rankings = Rankings()
    rankings.attach(model)
    routers = [name for name, module in model.named_modules() if getattr(module, "settle", None) is not None]
    assert len(routers) == 3
    assert [name.split(".")[1] for name in routers] == ["0", "1", "2"]


def test_settled_scores_choose_and_do_not_weigh() -> None:
    logits = ties(5)
    other = logits.flip(1).softmax(-1)
    routing = choose(logits, 2, RouterConfig(), settle=lambda rank: other)
    assert torch.equal(routing.experts, other.topk(2).indices)
    wanted = logits.softmax(-1).gather(1, routing.experts)
    assert torch.allclose(routing.weights, wanted / wanted.sum(-1, keepdim=True))
