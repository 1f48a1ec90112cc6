"""Causal convolution and gated norms against their formulas: values, gradients, dtypes, documents, halos, odd shapes."""

from __future__ import annotations

import pytest
import torch

from lctrain.kernels.causal_conv import fused as conv
from lctrain.kernels.causal_conv import reference as conv_reference
from lctrain.kernels.gated_norm import fused as norm
from lctrain.kernels.gated_norm import reference as norm_reference

PRECISIONS = [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(fast, formula, inputs, dtype, allowed):
    """Values and gradients of `fast` in `dtype` against `formula` in fp64 on the same rounded inputs."""
    ours = [x.to(dtype).requires_grad_() for x in inputs]
    oracle = [x.detach().double().requires_grad_() for x in ours]
    y, wanted = fast(*ours), formula(*oracle)
    assert (y.dtype, y.shape) == (dtype, wanted.shape)
    slope = random(*y.shape, seed=7).to(dtype)
    grads = torch.autograd.grad(y, ours, slope, materialize_grads=True)
    expected = torch.autograd.grad(wanted, oracle, slope.double(), materialize_grads=True)
    for found, right in zip((y, *grads), (wanted, *expected), strict=True):
        if right.numel():
            assert (
                float((found.detach().double() - right.detach()).abs().max() / right.detach().abs().max().clamp(min=1e-30))
                < allowed
            )


@pytest.fixture(params=[1, 40, 1 << 17])
def block(request, monkeypatch):
    """Blocks of a few tokens, so that their borders are crossed, and large ones."""
    monkeypatch.setattr(conv, "BLOCK", request.param)


@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("rows", "tokens", "taps"), [(2, 37, 4), (1, 1, 4), (2, 2, 4), (1, 30, 2), (2, 0, 4)])
@pytest.mark.usefixtures("block")
def test_convolution(rows, tokens, taps, documents, dtype, allowed):
    positions = torch.randint(0, 6, (rows, tokens), generator=torch.Generator().manual_seed(1)) if documents else None
    inputs = [random(rows, tokens, 5), random(5, taps, seed=1), random(5, seed=2), random(rows, taps - 1, 5, seed=3)]
    compare(
        lambda x, w, b, h: conv.causal_conv(x, w, b, positions, h),
        lambda x, w, b, h: conv_reference.causal_conv(x, w, b, positions, h),
        inputs,
        dtype,
        allowed,
    )


@pytest.mark.usefixtures("block")
def test_convolution_without_bias_and_halo():
    compare(conv.causal_conv, conv_reference.causal_conv, [random(2, 9, 3), random(3, 4, seed=1)], torch.float64, 1e-13)


def test_convolution_is_torchs():
    """The order of taps is that of conv1d, in which published weights are stored."""
    x, weight, bias = random(2, 11, 6), random(6, 4, seed=1), random(6, seed=2)
    wanted = torch.nn.functional.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)[..., :11]
    torch.testing.assert_close(conv.causal_conv(x, weight, bias), torch.nn.functional.silu(wanted).transpose(1, 2))


def test_convolution_leaks_no_bit():
    x, weight, positions = random(1, 20, 3).float(), random(3, 4, seed=1).float(), torch.arange(20)[None].clone()
    positions[:, 8:] -= 8
    changed = x.clone()
    changed[:, :8] *= 5
    first, second = (conv.causal_conv(each, weight, positions=positions) for each in (x, changed))
    assert torch.equal(first[:, 8:], second[:, 8:])


@pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)
@pytest.mark.parametrize(("shape", "groups"), [((1, 1, 4), 1), ((2, 7, 24), 3), ((3, 10), 10), ((0, 6), 2)])
@pytest.mark.parametrize("name", ["gated_rms_norm", "rms_norm_then_gate"])
def test_norms(name, shape, groups, dtype, allowed):
    inputs = [random(*shape), random(*shape, seed=1), random(shape[-1], seed=2)]
    fast, formula = getattr(norm, name), getattr(norm_reference, name)
    compare(lambda *t: fast(*t, 1e-5, groups), lambda *t: formula(*t, 1e-5, groups), inputs, dtype, allowed)


@pytest.mark.parametrize("name", ["gated_rms_norm", "rms_norm_then_gate"])
def test_norms_keep_their_inputs_only(name):
    y, gate, weight = random(4, 8).requires_grad_(), random(4, 8, seed=1), torch.ones(8, dtype=torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        getattr(norm, name)(y, gate, weight, 1e-5, 2)
    assert sorted(t.numel() for t in saved) == [8, 8, 32, 32]
