"""RMSNorm, rotary embedding and SwiGLU against their formulas: values, gradients, dtypes, odd shapes, what is kept."""

from __future__ import annotations

import pytest
import torch

from lctrain.kernels.rms_norm import fused as norm
from lctrain.kernels.rms_norm import reference as norm_reference
from lctrain.kernels.rotary import fused as rotary
from lctrain.kernels.rotary import reference as rotary_reference
from lctrain.kernels.swiglu import fused as swiglu
from lctrain.kernels.swiglu import reference as swiglu_reference

EPS = 1e-5


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def angles(batch, tokens, half, dtype):
    angle = torch.randn(batch, tokens, 1, half, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def error(ours, oracle):
    return float((ours.double() - oracle).abs().max() / oracle.abs().max().clamp(min=1e-30))


def compare(fast, formula, inputs, dtype, allowed):
    """Values and gradients of `fast` in `dtype` against `formula` in fp64 on the same rounded inputs."""
    ours = [x.detach().to(dtype).requires_grad_() for x in inputs]
    oracle = [x.detach().double().requires_grad_() for x in ours]
    y, expected = fast(*ours), formula(*oracle)
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    assert error(y.detach(), expected.detach()) < allowed
    slope = random(*y.shape, seed=7).detach().to(dtype)
    y.backward(slope)
    expected.backward(slope.double())
    for x, wanted in zip(ours, oracle, strict=True):
        assert x.grad.dtype == x.dtype
        assert error(x.grad, wanted.grad) < allowed


PRECISIONS = [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]


@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 24), (3, 65)])
class TestRMSNorm:
    def test_values_and_gradients(self, shape, dtype, allowed):
        inputs = [random(*shape), random(shape[-1], seed=1)]
        compare(lambda x, w: norm.rms_norm(x, w, EPS), lambda x, w: norm_reference.rms_norm(x, w, EPS), inputs, dtype, allowed)


@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 10)])
class TestRotary:
    def test_values_and_gradients(self, shape, dtype, allowed):
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = angles(*shape[:2], shape[-1] // 2, wide)
        compare(
            lambda x: rotary.rotate(x, cos, sin),
            lambda x: rotary_reference.rotate(x, cos.double(), sin.double()),
            [random(*shape)],
            dtype,
            allowed,
        )


@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 24), (5, 3)])
class TestSwiglu:
    def test_values_and_gradients(self, shape, dtype, allowed):
        inputs = [random(*shape), random(*shape, seed=1), random(5, shape[-1], seed=2)]
        compare(swiglu.swiglu_linear, swiglu_reference.swiglu_linear, inputs, dtype, allowed)

    def test_weights_may_be_wider(self, shape, dtype, allowed):
        gate, up, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1), random(5, shape[-1], seed=2)
        swiglu.swiglu_linear(gate, up, weight).sum().backward()
        assert (gate.grad.dtype, weight.grad.dtype) == (dtype, torch.float64)


def test_rows_of_zeros_stay_finite():
    x = torch.zeros(3, 4, requires_grad=True)
    y = norm.rms_norm(x, torch.ones(4), EPS)
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(x.grad).all()


def test_frozen_weights_get_no_gradient():
    x, weight = random(2, 4), random(4, seed=1).detach()
    norm.rms_norm(x, weight, EPS).sum().backward()
    gate, matrix = random(2, 4), random(3, 4, seed=1).detach()
    swiglu.swiglu_linear(gate, gate, matrix).sum().backward()
    assert weight.grad is None
    assert matrix.grad is None


@pytest.mark.parametrize(
    ("kept", "run"),
    [
        (1, lambda x: norm.rms_norm(x, torch.ones(64), EPS)),
        (0, lambda x: rotary.rotate(x.view(1, 8, 1, 64), *angles(1, 8, 32, torch.float32))),
        (1, lambda x: swiglu.swiglu_linear(x, x, torch.ones(4, 64))),
    ],
)
def test_what_is_kept_for_backward(kept, run):
    x = random(8, 64, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(x)
    storages = {t.untyped_storage().data_ptr() for t in saved if t.shape[-1] == 64 and t.numel() == x.numel()}
    assert len(storages) == kept
