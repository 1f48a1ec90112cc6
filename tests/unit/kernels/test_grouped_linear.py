"""Grouped matrix products against a loop, in every dtype and with every shape that the operator does not take."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lctrain.kernels.grouped_linear import product, reference
from lctrain.kernels.grouped_linear.fused import grouped_linear, grouped_swiglu_linear

COUNTS = {
    "even": [3, 3, 3],
    "empty groups": [0, 5, 0, 0, 4],
    "one token": [0, 1],
    "first and last empty": [0, 7, 0],
    "no tokens": [0, 0, 0],
    "one group": [6],
}
EXACT = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def leaves(counts: list[int], k: int, n: int, dtype: torch.dtype, tail: int = 0):
    torch.manual_seed(0)
    x = torch.randn(sum(counts) + tail, k, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), n, k, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    return x, weight, torch.tensor(counts).cumsum(0).to(torch.int32)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    assert float((found.double() - wanted.double()).norm()) <= EXACT[dtype] * float(wanted.double().norm())


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(("k", "n"), [(16, 32), (5, 7), (16, 6), (6, 16)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_linear(counts: list[int], k: int, n: int, dtype: torch.dtype) -> None:
    x, weight, ends = leaves(counts, k, n, dtype, tail=2)
    y = grouped_linear(x, weight, ends)
    assert y.dtype == dtype
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, (x, weight), dy)]
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, weight)]
    wanted = reference.grouped_linear(*exact, ends)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, dy.double(), materialize_grads=True)]
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours.detach(), theirs.detach(), dtype)
    assert not y[len(y) - 2 :].any(), "rows of no group are 0"
    assert not found[1][len(y) - 2 :].any()


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_swiglu(counts: list[int], dtype: torch.dtype) -> None:
    gate, weight, ends = leaves(counts, 16, 8, dtype)
    up = torch.randn_like(gate, requires_grad=True)
    y = grouped_swiglu_linear(gate, up, weight, ends)
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, (gate, up, weight), dy)]
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (gate, up, weight)]
    wanted = reference.grouped_swiglu_linear(*exact, ends)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, dy.double(), materialize_grads=True)]
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours.detach(), theirs.detach(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [16, 6])
def test_a_row_does_not_depend_on_the_size_of_its_group(k: int, dtype: torch.dtype) -> None:
    """To the last bit, on one thread: what a token gets must not tell how many others go to its expert."""
    x, weight, ends = leaves([40], k, 32, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = grouped_linear(x, weight, ends)
        for rows in range(1, 40):
            twice = torch.tensor([rows, 40], dtype=torch.int32)
            assert torch.equal(grouped_linear(x, weight.repeat(2, 1, 1), twice), whole), rows
    finally:
        torch.set_num_threads(threads)


def test_gradcheck() -> None:
    gate, weight, ends = leaves([2, 0, 3], 3, 2, torch.float64)
    up = torch.randn_like(gate, requires_grad=True)
    torch.autograd.gradcheck(lambda *args: grouped_linear(args[0], args[1], ends), (gate, weight))
    torch.autograd.gradcheck(lambda *args: grouped_swiglu_linear(*args, ends), (gate, up, weight))


def test_a_gradient_without_strides() -> None:
    """`y.sum().backward()` hands the operator an expanded scalar, which its own backward refuses."""
    x, weight, ends = leaves([4, 4], 16, 16, torch.float32)
    grouped_linear(x, weight, ends).sum().backward()
    assert torch.allclose(weight.grad[0], x.detach()[:4].sum(0).expand(16, -1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_shapes_without_data(dtype: torch.dtype) -> None:
    """The operator raises for fp32 here, which a loop over data that is not there would do too."""
    with FakeTensorMode():
        x, weight = torch.randn(4, 16, dtype=dtype), torch.randn(2, 8, 16)
        assert grouped_linear(x, weight, torch.zeros(2, dtype=torch.int32)).shape == (4, 8)


def test_the_operator_is_used_where_it_is_safe(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(product.F, "grouped_mm", lambda *args, offs: calls.append(1) or torch.zeros(4, 16))
    ends = torch.tensor([4], dtype=torch.int32)
    for dtype, width, used in [(torch.float32, 16, 1), (torch.float32, 6, 0), (torch.float64, 16, 0), (torch.bfloat16, 12, 0)]:
        calls.clear()
        product.rows_times(torch.zeros(4, width, dtype=dtype), torch.zeros(1, width, 16, dtype=dtype), ends)
        assert len(calls) == used, (dtype, width)
    calls.clear()
    shifted = torch.zeros(4 * 16 + 1)[1:].view(4, 16)  # begins 4 bytes after an aligned address
    product.rows_times(shifted, torch.zeros(1, 16, 16), ends)
    assert not calls
