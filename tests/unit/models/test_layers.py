"""RMSNorm, Linear and the feed-forward network, against formulas."""

import pytest
import torch
import torch.nn.functional as F

from lctrain.models.layers import Linear, RMSNorm
from lctrain.models.mlp import Mlp


def norm(dtype: torch.dtype = torch.float64, eps: float = 1e-5) -> RMSNorm:
    module = RMSNorm(8, eps)
    torch.nn.init.normal_(module.weight, 1.0, 0.3)
    return module.to(dtype)


def test_rms_norm_is_the_formula() -> None:
    torch.manual_seed(0)
    module, x, dy = norm(), torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 8).double()
    y = module(x)
    y.backward(dy)
    weight, leaf = module.weight.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    formula = leaf / torch.sqrt((leaf**2).mean(-1, keepdim=True) + 1e-5) * weight
    formula.backward(dy)
    for got, want in ((y, formula), (x.grad, leaf.grad), (module.weight.grad, weight.grad)):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-12)


def test_rms_norm_of_zeros_and_of_tiny_numbers() -> None:
    module = norm(torch.float32, eps=1e-5)
    assert (module(torch.zeros(1, 8)) == 0).all()
    x = torch.full((1, 8), 1e-3)
    torch.testing.assert_close(module(x), x / (1e-6 + 1e-5) ** 0.5 * module.weight)


def test_rms_norm_of_bf16_has_fp32_statistics() -> None:
    torch.manual_seed(0)
    module, x = norm(torch.float32), (100 * torch.randn(64, 8)).bfloat16()
    y = module(x)
    assert y.dtype == torch.bfloat16
    weight = module.weight.detach().bfloat16().double()
    exact = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=0)


def test_linear_computes_in_the_dtype_of_its_input() -> None:
    torch.manual_seed(0)
    module = Linear(4, 3, bias=True)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    y = module(torch.ones(2, 4, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.weight.grad.dtype == module.bias.grad.dtype == torch.float32, "the optimizer's weights stay fp32"
    assert Linear(4, 3).bias is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
def test_mlp_is_the_formula(model_config, activation: str, bias: bool) -> None:
    torch.manual_seed(0)
    module = Mlp(model_config(mlp={"activation": activation, "bias": bias})).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    y = module(x, None)
    dy = torch.randn_like(y)
    y.backward(dy)

    weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    leaf = x.detach().clone().requires_grad_()

    def project(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ weights[f"{name}.weight"].T + (weights[f"{name}.bias"] if bias else 0)

    hidden = project("up", leaf)
    if activation == "swiglu":
        gate = project("gate", leaf)
        hidden = gate * torch.sigmoid(gate) * hidden
    elif activation == "gelu":
        hidden = F.gelu(hidden, approximate="tanh")
    else:
        hidden = hidden.clamp(min=0) ** 2
    want = project("down", hidden)
    want.backward(dy)
    torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(x.grad, leaf.grad, atol=1e-12, rtol=1e-12)
    assert set(weights) == {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-12, rtol=1e-12, msg=name)


def test_only_swiglu_has_a_gate(model_config) -> None:
    sizes = {
        a: sum(p.numel() for p in Mlp(model_config(mlp={"activation": a})).parameters()) for a in ("swiglu", "gelu", "relu2")
    }
    assert sizes == {"swiglu": 3 * 32 * 48, "gelu": 2 * 32 * 48, "relu2": 2 * 32 * 48}
