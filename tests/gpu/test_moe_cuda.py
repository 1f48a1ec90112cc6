"""Experts on a CUDA device against the same on the CPU."""

import pytest
import torch

from lctrain.kernels.grouped_linear import reference
from lctrain.kernels.grouped_linear.fused import grouped_linear, grouped_swiglu_linear
from tests.unit.moe.problem import D_MODEL, LENGTH, make_moe, sequence, settings

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double().cpu() - wanted.double().cpu()).norm() / wanted.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("dtype", "bar"), DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("counts", [[40, 0, 3, 85], [0, 0, 0, 7], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("width", [64, 13])
def test_grouped_products(dtype, bar, counts, width):
    """Empty groups and rows of no group included; widths that the operator does not take too."""
    torch.manual_seed(0)
    rows = sum(counts) + 5
    gate, up = (torch.randn(rows, width, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.randn(len(counts), 32, width, device="cuda", requires_grad=True)
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    exact = [x.detach().to(dtype).double().cpu().requires_grad_() for x in (gate, up, weight)]
    dy = torch.randn(rows, 32, device="cuda", dtype=dtype)
    for ours, theirs, leaves in (
        (grouped_linear, reference.grouped_linear, (0, 2)),
        (grouped_swiglu_linear, reference.grouped_swiglu_linear, (0, 1, 2)),
    ):
        mine, wanted = ([t[i] for i in leaves] for t in ((gate, up, weight), exact))
        y, plain = ours(*mine, ends), theirs(*wanted, ends.cpu())
        grads = torch.autograd.grad(y, mine, dy)
        want = torch.autograd.grad(plain, wanted, dy.double().cpu(), materialize_grads=True)
        for found, expected in zip((y.detach(), *grads), (plain.detach(), *want), strict=True):
            assert torch.isfinite(found).all()
            assert error(found, expected) <= bar
        assert not y[sum(counts) :].any()


@pytest.mark.parametrize(("dtype", "bar"), DTYPES, ids=["fp32", "bf16"])
def test_layer(dtype, bar):
    config = settings(d_ff=16, shared_d_ff=16, capacity_factor=1.0, balance={"switch": 0.1, "sequence": 0.1, "bias_rate": 0.1})
    results = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float32)):
        layer = make_moe(config, torch.float32).to(device)
        x = torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(0)).to(dtype)
        leaf = x.to(device, kind).requires_grad_()
        out = layer(leaf, sequence())
        out.square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad for p in layer.parameters()), layer.balancer.sums])
    for found, wanted in zip(*results, strict=True):
        assert error(found, wanted) <= 2 * bar


def test_the_same_bits_every_time():
    layer = make_moe(settings(d_ff=16), torch.float32).to("cuda")
    x = torch.randn(2, LENGTH, D_MODEL, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    runs = []
    for _ in range(2):
        out = layer(x, sequence())
        runs.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
