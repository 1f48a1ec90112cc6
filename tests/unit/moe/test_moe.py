"""The layer on one process against a loop over tokens and experts, in fp64: outputs and all gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.unit.moe.problem import (
    D_MODEL,
    DOCUMENTS,
    LENGTH,
    documents_of,
    loop,
    make_moe,
    real_mask,
    sequence,
    settings,
)

LAYERS = {
    "softmax, renormalised": {},
    "softmax as it is": {"router": {"renormalise": False}},
    "sigmoid, bias, scale": {"router": {"score": "sigmoid", "scale": 2.5}, "balance": {"bias_rate": 0.1}},
    "gelu": {"activation": "gelu"},
    "relu2, one expert per token": {"activation": "relu2", "top_k": 1, "router": {"renormalise": False}},
    "all experts": {"top_k": 8},
    "shared, gated": {"shared_d_ff": 20, "shared_gate": True},
    "shared": {"shared_d_ff": 20},
    "strides that the operator does not take": {"d_ff": 7},
}


@pytest.mark.parametrize("name", LAYERS)
def test_against_a_loop(name: str) -> None:
    config = settings(**LAYERS[name])
    layer = make_moe(config)
    router = config.moe.router
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64, requires_grad=True)
    out = layer(x, sequence())

    real = real_mask()
    own = x[real]
    logits = own @ layer.router.weight.t()
    scores = logits.softmax(-1) if router.score == "softmax" else logits.sigmoid()
    ranked = scores if layer.balancer.bias is None else scores + layer.balancer.bias
    experts = torch.stack(
        [torch.tensor(sorted(range(8), key=lambda e: -row[e])[: config.moe.top_k]) for row in ranked.detach()]
    )
    weights = scores.gather(1, experts)
    if router.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    plain = torch.zeros_like(x).masked_scatter(real[..., None], loop(layer, own, experts, weights * router.scale))
    if layer.shared is not None:
        hidden = F.silu(x @ layer.shared.gate.weight.t()) * (x @ layer.shared.up.weight.t())
        y = hidden @ layer.shared.down.weight.t()
        plain = plain + (y if layer.shared_gate is None else y * torch.sigmoid(x @ layer.shared_gate.weight.t()))
    assert torch.allclose(out, plain, atol=1e-12)

    leaves = [x, *layer.parameters()]
    dout = torch.randn_like(out)
    for leaf, ours, theirs in zip(
        leaves, torch.autograd.grad(out, leaves, dout), torch.autograd.grad(plain, leaves, dout, allow_unused=True), strict=True
    ):
        theirs = torch.zeros_like(leaf) if theirs is None else theirs  # top-1, renormalised: the router has no gradient
        assert torch.allclose(ours, theirs, atol=1e-11), (name, leaf.shape)


def test_no_tokens_and_one_token() -> None:
    layer = make_moe(settings(shared_d_ff=8))
    for documents, length in [(((0,),), 3), (((0, 1),), 1)]:
        x = torch.randn(1, length, D_MODEL, dtype=torch.float64, requires_grad=True)
        out = layer(x, sequence(documents, length))
        grads = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
        assert all(torch.isfinite(grad).all() for grad in grads)
        if documents == ((0,),):
            names = dict(layer.named_parameters())
            assert not any(grad.any() for name, grad in zip(names, grads[1:], strict=True) if "shared" not in name)


def test_bf16_keeps_router_and_sums_in_fp32() -> None:
    layer = make_moe(settings(d_ff=16), torch.float32)
    x = torch.randn(2, LENGTH, D_MODEL)
    exact = layer(x.bfloat16().float(), sequence())
    out = layer(x.bfloat16(), sequence())
    assert out.dtype == torch.bfloat16
    assert float(((out.float() - exact).norm() / exact.norm()).detach()) < 1e-2, "the same experts were chosen"


def test_decode_equals_forward() -> None:
    layer = make_moe(settings(shared_d_ff=8, router={"tasks": 3}))
    x = torch.randn(1, 9, D_MODEL, dtype=torch.float64)
    for task in range(3):
        state = layer.new_state()
        state.task = task
        whole = layer(x, sequence(((0, 9),), 9, tasks=((task,),)))
        pieces = torch.cat([layer.decode(x[:, a:b], state) for a, b in [(0, 4), (4, 5), (5, 9)]], dim=1)
        assert torch.allclose(pieces, whole, atol=1e-13)
    assert not torch.allclose(layer(x, sequence(((0, 9),), 9)), whole), "tasks have gates of their own"


def test_every_document_has_the_gate_of_its_task() -> None:
    layer = make_moe(settings(router={"tasks": 3}))
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    tasks = ((2, 0, 1), (1,))
    out = layer(x, sequence(tasks=tasks))
    for (row, start, end), task in zip(documents_of(), sum(tasks, ()), strict=True):
        alone = layer(x[row : row + 1, start:end], sequence(((0, end - start),), end - start, tasks=((task,),)))
        assert torch.allclose(out[row, start:end], alone[0], atol=1e-13)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3, 8.0])
def test_capacity_serves_the_first_of_each_document(factor: float) -> None:
    config = settings(capacity_factor=factor)
    layer = make_moe(config)
    x = torch.randn(2, LENGTH, D_MODEL, dtype=torch.float64)
    out = layer(x, sequence())
    for row, start, end in documents_of():
        own = x[row, start:end]
        routing = layer.router(own, torch.zeros(end - start).long(), None, None)
        room = math.ceil(factor * 2 * (end - start) / 8)
        served, experts = [0] * 8, routing.experts.clone()
        for token in range(end - start):
            for choice in range(2):
                expert = int(experts[token, choice])
                served[expert] += 1
                if served[expert] > room:
                    experts[token, choice] = -1
        assert torch.allclose(out[row, start:end], loop(layer, own, experts, routing.weights), atol=1e-12)


def test_a_document_does_not_feel_its_neighbours() -> None:
    """With capacity too, to the last bit."""
    layer = make_moe(settings(capacity_factor=1.0), torch.float32)
    x = torch.randn(2, LENGTH, D_MODEL)
    before = layer(x, sequence())
    changed = x.clone()
    changed[0, :7] = torch.randn(7, D_MODEL)
    after = layer(changed, sequence())
    assert not torch.equal(after[0, :7], before[0, :7])
    assert torch.equal(after[0, 7:], before[0, 7:])
    assert torch.equal(after[1], before[1])


def test_later_tokens_do_not_matter() -> None:
    layer = make_moe(settings(capacity_factor=1.0), torch.float32)
    x = torch.randn(1, 20, D_MODEL)
    changed = x.clone()
    changed[0, 13:] += 1
    meta = sequence(((0, 20),), 20)
    assert torch.equal(layer(x, meta)[0, :13], layer(changed, meta)[0, :13])


def test_flops_are_those_of_active_experts() -> None:
    config = settings(shared_d_ff=20, shared_gate=True, top_k=3)
    tokens = sum(end - start for _, start, end in documents_of())
    per_token = 16 * 8 + 3 * (3 * 16 * 12) + 3 * 16 * 20 + 16
    assert make_moe(config).flops(DOCUMENTS) == 2 * tokens * per_token
