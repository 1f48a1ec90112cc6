"""The oracle itself, against torch and by hand."""

import pytest
import torch
import torch.nn.functional as F

from lctrain.kernels.attention import reference


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_agrees_with_torch(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    query_heads, key_heads = heads
    q = torch.randn(2, 7, query_heads, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 9, key_heads, 8, dtype=torch.float64) for _ in range(2))
    live = torch.rand(7, 9) < 0.5
    live[:, 0] = True
    out, lse = reference.attention(q, k, v, live)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=live, enable_gqa=True)
    torch.testing.assert_close(out, theirs.transpose(1, 2), atol=1e-13, rtol=1e-12)
    score = (q[0, 2, 1] @ k[0, :, 1 // (query_heads // key_heads)].T) / 8**0.5
    assert float(lse[0, 1, 2]) == pytest.approx(float(score[live[2]].logsumexp(0)), abs=1e-12)


def test_rows_that_see_nothing_give_zero_and_no_gradient() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    live = torch.rand(2, 5, 5) < 0.5
    live[:, :, 0] = True
    live[0, 3] = False
    live[:, :, 4] = False  # and a key that nobody sees
    out, lse = reference.attention(q, k, v, live)
    assert (out[0, 3] == 0).all()
    assert (lse[0, :, 3] == -float("inf")).all()
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
    assert (q.grad[0, 3] == 0).all()
    assert (k.grad[:, 4] == 0).all()
    assert (v.grad[:, 4] == 0).all()


def test_scale() -> None:
    q = k = v = torch.eye(2, dtype=torch.float64).reshape(1, 2, 1, 2)
    out, lse = reference.attention(q, k, v, torch.ones(2, 2, dtype=torch.bool), scale=3.0)
    weight = 1 / (1 + torch.tensor(-3.0, dtype=torch.float64).exp())
    torch.testing.assert_close(out[0, 0, 0], torch.stack([weight, 1 - weight]))
    assert float(lse[0, 0, 0]) == pytest.approx(float(torch.tensor([3.0, 0.0]).logsumexp(0)))
