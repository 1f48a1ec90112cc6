"""The order of tokens by expert, and the weighted sum that undoes it."""

import pytest
import torch

from lctrain.kernels.permute import reference
from lctrain.kernels.permute.fused import combine, permutation, spread


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("tokens", "k", "n_experts"), [(7, 2, 4), (1, 1, 3), (0, 2, 4), (33, 3, 5), (5, 4, 4)])
def test_spread_and_combine(tokens: int, k: int, n_experts: int, dropping: bool) -> None:
    torch.manual_seed(tokens)
    experts = torch.stack([torch.randperm(n_experts)[:k] for _ in range(tokens)]) if tokens else torch.zeros(0, k).long()
    kept = torch.rand(tokens, k) < 0.6 if dropping else None
    order = permutation(experts, n_experts, kept)
    here = torch.ones_like(experts, dtype=torch.bool) if kept is None else kept
    assert order.counts.tolist() == [int(((experts == e) & here).sum()) for e in range(n_experts)]
    wanted = [t for e in range(n_experts) for t in range(tokens) if ((experts[t] == e) & here[t]).any()]
    assert order.tokens.tolist() == wanted, "by expert, then by token"
    assert ((order.places < 0) == ~here).all()

    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, k, dtype=torch.float64, requires_grad=True)
    out = combine(spread(x, order).sin(), order, weights)
    plain = reference.combine(x[order.tokens].sin(), order.places, weights)
    assert torch.allclose(out, plain, atol=1e-14)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, weights), dout)
    exact = torch.autograd.grad(plain, (x, weights), dout, allow_unused=True, materialize_grads=True) if tokens else found
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-14)


def test_bf16_sums_in_fp32() -> None:
    """1 + 2^-9 + 2^-9 is 1 + 2^-8 in fp32; bf16 partial sums would lose both small terms."""
    order = permutation(torch.tensor([[0, 1, 2]]), 3)
    y = torch.tensor([[1.0], [2**-8], [2**-8]], dtype=torch.bfloat16)
    out = combine(y, order, torch.ones(1, 3))
    assert out.dtype == torch.bfloat16
    assert float(out) == 1 + 2**-7
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(spread(x, order), x, y)
    assert float(grad) == 1 + 2**-7


def test_the_same_bits_every_time() -> None:
    torch.manual_seed(0)
    experts, weights = torch.randint(0, 8, (500, 1)), torch.rand(500, 1)
    x, runs = torch.randn(500, 16, requires_grad=True), []
    for _ in range(2):
        order = permutation(experts, 8)
        out = combine(spread(x, order), order, weights)
        runs.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
