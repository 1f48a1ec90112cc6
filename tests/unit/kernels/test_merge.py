"""Merging partial attention results."""

import pytest
import torch

from lctrain.kernels.attention import reference
from lctrain.kernels.attention.merge import add_sinks, merge_

INF = float("inf")


def random_parts(keys: int, parts: int, dtype: torch.dtype = torch.float64):
    """Attention over `keys` keys at once, and over each part of them; row 0 sees no key, row 1 only the first part's."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 8, dtype=dtype) for n in (6, keys, keys))
    live = torch.rand(6, keys) < 0.6
    live[0] = False
    live[1, keys // parts :] = False
    live[1, 0] = True
    size = keys // parts
    slices = [slice(i * size, (i + 1) * size) for i in range(parts)]
    return reference.attention(q, k, v, live), [reference.attention(q, k[:, s], v[:, s], live[:, s]) for s in slices]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_parts_in_any_order_make_the_whole(order) -> None:
    (out, lse), parts = random_parts(12, 3)
    merged, merged_lse = torch.zeros_like(out), torch.full_like(lse, -INF)
    for index in order:
        merge_(merged, merged_lse, *parts[index])
    torch.testing.assert_close(merged, out, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(merged_lse, lse, atol=1e-14, rtol=1e-13)
    assert (merged[:, 0] == 0).all()
    assert (merged_lse[:, :, 0] == -INF).all()


@pytest.mark.parametrize(("before", "new"), [(-INF, -INF), (-INF, 1.0), (1.0, -INF), (1.0, 2.0)])
def test_empty_on_either_side(before: float, new: float) -> None:
    one, two = (0.0 if x == -INF else x + 4 for x in (before, new))
    out, lse = torch.full((1, 1, 1, 3), one), torch.full((1, 1, 1), before)
    merge_(out, lse, torch.full_like(out, two), torch.full_like(lse, new))
    total = torch.logaddexp(torch.tensor(before), torch.tensor(new))
    weights = [0.0 if x == -INF else float(torch.exp(x - total)) for x in (before, new)]
    torch.testing.assert_close(out, torch.full_like(out, weights[0] * one + weights[1] * two))
    assert float(lse) == pytest.approx(float(total))


def test_far_apart_scores_do_not_overflow() -> None:
    out, lse = torch.ones(1, 2, 1, 3), torch.tensor([[[900.0, -900.0]]])
    merge_(out, lse, torch.full_like(out, 5.0), -lse)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1.0, 5.0]))
    torch.testing.assert_close(lse[0, 0], torch.tensor([900.0, 900.0]))


def test_half_precision_parts_add_up_in_fp32() -> None:
    out, lse = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), -INF)
    part = torch.full((1, 1, 1, 4), 0.123, dtype=torch.bfloat16)
    for _ in range(3):
        merge_(out, lse, part, torch.zeros(1, 1, 1))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, part.float(), atol=1e-7, rtol=0)
    assert float(lse) == pytest.approx(float(torch.tensor(3.0).log()))


def test_a_broken_value_stays_visible() -> None:
    """NaN in one part must reach the loss, where the loop reports it."""
    out, lse = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1)
    merge_(out, lse, torch.full_like(out, float("nan")), torch.full_like(lse, float("nan")))
    assert out.isnan().all()


def test_sinks_are_keys_without_value() -> None:
    """One more key per head with the sink as its score: computed by the oracle with k and v extended."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 8, dtype=torch.float64) for n in (5, 6, 6))
    live = torch.rand(5, 6) < 0.6
    live[0] = False  # a row whose only key is the sink
    sinks = torch.randn(4, dtype=torch.float64)
    out, lse = add_sinks(*reference.attention(q, k, v, live), sinks)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    scores = scores.masked_fill(~live, -INF)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(2, 4, 5, 1)], dim=-1)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-13, rtol=1e-12)
    weights = scores.softmax(-1)[..., :-1]
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", weights, v), atol=1e-13, rtol=1e-12)
    assert (out[:, 0] == 0).all()
