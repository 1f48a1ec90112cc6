"""Scan, convolution and gated norms on CUDA, against the plain references in fp64; mamba_ssm's kernel where it is installed."""

import importlib.util

import pytest
import torch

from lctrain.kernels.causal_conv import fused as conv
from lctrain.kernels.causal_conv import reference as conv_reference
from lctrain.kernels.gated_norm import fused as norm
from lctrain.kernels.gated_norm import reference as norm_reference
from lctrain.kernels.ssd import best, chunked, reference

ROWS, TOKENS, HEADS, SIZE, GROUPS, STATE = 2, 300, 4, 64, 2, 64
needs_library = pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba_ssm")


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, device="cuda")


def compare(fast, formula, inputs, allowed):
    """Values and all gradients; the formula computes in fp64 on the same inputs."""
    ours = [t.detach().clone().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, wanted = fast(*ours), formula(*exact)
    slope = torch.randn_like(wanted).to(y.dtype)
    found = [y, *torch.autograd.grad(y, ours, slope)]
    for one, two in zip(found, [wanted, *torch.autograd.grad(wanted, exact, slope.double())], strict=True):
        assert float((one.detach().double() - two.detach()).abs().max() / two.detach().abs().max()) < allowed


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scan", [chunked.ssd, pytest.param(best.mamba_ssm, marks=needs_library)])
def test_scan(scan, dtype, allowed):
    if scan is best.mamba_ssm and dtype == torch.float32:
        allowed = 1e-2  # its products run in TF32
    resets = torch.zeros(ROWS, TOKENS, dtype=torch.bool, device="cuda")
    resets[0, [0, 50, 51, 200]] = True
    inputs = [
        random(ROWS, TOKENS, HEADS, SIZE).to(dtype),
        random(ROWS, TOKENS, HEADS).exp().mul(0.1).float(),
        -random(HEADS).exp().float(),
        random(ROWS, TOKENS, GROUPS, STATE).to(dtype),
        random(ROWS, TOKENS, GROUPS, STATE).to(dtype),
        random(HEADS).float(),
        random(ROWS, HEADS, SIZE, STATE).float(),
    ]
    compare(
        lambda *t: scan(*t, resets, chunk=128)[0],
        lambda *t: reference.ssd(*t, resets)[0],
        inputs,
        allowed,
    )


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_convolution_and_norms(dtype, allowed):
    positions = torch.arange(TOKENS, device="cuda").remainder(70).expand(ROWS, -1)
    x, weight, bias = random(ROWS, TOKENS, 48).to(dtype), random(48, 4).float(), random(48).float()
    compare(
        lambda *t: conv.causal_conv(*t, positions),
        lambda *t: conv_reference.causal_conv(*t, positions),
        [x, weight, bias],
        allowed,
    )
    for name in ("gated_rms_norm", "rms_norm_then_gate"):
        compare(
            lambda *t, name=name: getattr(norm, name)(*t, 1e-5, 4),
            lambda *t, name=name: getattr(norm_reference, name)(*t, 1e-5, 4),
            [x, random(ROWS, TOKENS, 48).to(dtype), bias],
            allowed,
        )
