"""Output projection and cross-entropy in one, against torch's two."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.models.loss import linear_cross_entropy
from lctrain.parallel.layout import IGNORE

TOKENS, WIDTH, VOCAB = 37, 12, 29


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, VOCAB, (TOKENS,))
    labels[[0, 5, 6, TOKENS - 1]] = IGNORE
    return (
        torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True),
        torch.randn(VOCAB, WIDTH, dtype=dtype, requires_grad=True),
        labels,
    )


def torchs(hidden: Tensor, weight: Tensor, labels: Tensor, z_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = hidden @ weight.T
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    z = (logits.logsumexp(-1).square() * (labels != IGNORE)).sum()
    return losses.sum() + z_weight * z, losses.sum(), losses


def gradients(objective: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(objective * 0.37, leaves))


@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["fp64", "fp32"])
def test_agrees_with_torch(dtype: torch.dtype, tolerance: float, chunk: int, z_weight: float) -> None:
    hidden, weight, labels = inputs(dtype)
    objective, cross_entropy, losses = linear_cross_entropy(hidden, weight, labels, chunk, z_weight)
    want = torchs(hidden, weight, labels, z_weight)
    for got, expected in zip((objective, cross_entropy, losses), want, strict=True):
        torch.testing.assert_close(got.to(expected.dtype), expected, atol=tolerance, rtol=tolerance)
    assert cross_entropy.dtype == torch.float64
    pairs = zip(gradients(objective, hidden, weight), gradients(want[0], hidden, weight), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    assert (losses[labels == IGNORE] == 0).all()


def test_tied_weights_get_both_gradients() -> None:
    hidden, weight, labels = inputs(torch.float64)

    def mixed() -> Tensor:
        return F.embedding(labels.clamp(min=0), weight) + hidden

    (got,) = gradients(linear_cross_entropy(mixed(), weight, labels, 8)[0], weight)
    (want,) = gradients(torchs(mixed(), weight, labels, 0.0)[0], weight)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_no_targets_at_all() -> None:
    hidden, weight, _ = inputs(torch.float32)
    objective, cross_entropy, losses = linear_cross_entropy(hidden, weight, torch.full((TOKENS,), IGNORE), 8, 1e-3)
    assert float(objective.detach()) == float(cross_entropy) == 0
    assert (losses == 0).all()
    for gradient in gradients(objective, hidden, weight):
        assert (gradient == 0).all()


def test_rows_without_target_get_no_gradient() -> None:
    hidden, weight, labels = inputs(torch.float32)
    dhidden, _ = gradients(linear_cross_entropy(hidden, weight, labels, 8, 1e-2)[0], hidden, weight)
    assert (dhidden[labels == IGNORE] == 0).all()
    assert (dhidden[labels != IGNORE] != 0).any(dim=1).all()


def test_bf16_is_as_exact_as_bf16_logits_in_fp32() -> None:
    """Logits of bf16 hidden states are fp32; what is compared is torch's cross-entropy of such logits."""
    hidden, weight, labels = inputs(torch.float64)
    exact = torchs(hidden.bfloat16().double(), weight.bfloat16().double(), labels, 0.0)
    half = hidden.detach().bfloat16().requires_grad_()
    master = weight.detach().float().requires_grad_()
    objective, cross_entropy, losses = linear_cross_entropy(half, master, labels, 8)
    assert losses.dtype == torch.float32
    assert float(cross_entropy) == pytest.approx(float(exact[1].detach()), rel=1e-6)
    got = gradients(objective, half, master)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32]
    for gradient, want in zip(got, gradients(exact[0], hidden, weight), strict=True):
        assert float((gradient.double() - want).norm() / want.norm()) < 2**-7


@pytest.mark.parametrize("kind", ["hidden", "weight"])
def test_only_the_gradient_that_is_asked_for(kind: str) -> None:
    hidden, weight, labels = inputs(torch.float64)
    want = dict(zip(("hidden", "weight"), gradients(torchs(hidden, weight, labels, 0.0)[0], hidden, weight), strict=True))
    leaves = {"hidden": hidden, "weight": weight}
    leaves = {name: leaf if name == kind else leaf.detach() for name, leaf in leaves.items()}
    (got,) = gradients(linear_cross_entropy(*leaves.values(), labels, 8)[0], leaves[kind])
    torch.testing.assert_close(got, want[kind], atol=1e-12, rtol=1e-12)


def test_no_graph_and_no_gradient_work_where_gradients_are_off() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, labels = inputs(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective, _, losses = linear_cross_entropy(hidden, weight, labels, 8)
    assert not objective.requires_grad
    assert counter.get_total_flops() == 2 * TOKENS * WIDTH * VOCAB, "the logits and nothing else"
    with_gradients = linear_cross_entropy(hidden, weight, labels, 8)
    assert torch.equal(losses, with_gradients[2])
    assert not with_gradients[1].requires_grad
    assert not with_gradients[2].requires_grad


def test_never_all_logits_at_once() -> None:
    """Peak of live tensors stays near one chunk's logits: counted by watching every allocation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor):
                    self.size = max(self.size, tensor.numel())
            return out

    hidden, weight = torch.randn(512, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, torch.randint(0, 64, (512,)), chunk=32)[0].backward()
    assert largest.size == 32 * 64
