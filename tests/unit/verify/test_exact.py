"""The yardsticks: exact results against torch's own attention, and one process in bf16 near them."""

from __future__ import annotations

import pytest
import torch

from lctrain.parallel.mask import AttentionMask
from lctrain.verify.exact import Results, exact, one_process
from lctrain.verify.problem import Inputs, Problem

MASKS = ("causal", "full", "window", "documents", "documents_window", "sinks")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", ["mha", "gqa", "mqa", "uneven"])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_two_yardsticks_agree(mask: str, heads: str, length: int) -> None:
    """In fp32, so that they agree to rounding: two formulas, two programs."""
    problem = Problem(mask, length, 2, heads, "fp32", 0)
    inputs, rule = problem.inputs(), problem.attention_mask()
    for name, found, wanted in zip(Results._fields, one_process(inputs, rule), exact(inputs, rule), strict=True):
        if wanted is None:
            assert found is None
            continue
        real = torch.isfinite(found)  # the lse of padding is where they differ
        assert name == "lse" or real.all()
        assert torch.allclose(found[real].double(), wanted[real], rtol=1e-5, atol=3e-6), name


def test_sinks_are_a_key_of_value_0_in_the_softmax() -> None:
    """One token with one head: out = v * e^s / (e^s + e^sink)."""
    q, k, v = (torch.full((1, 1, 1, 1), x) for x in (2.0, 3.0, 5.0))
    sinks = torch.tensor([1.0])
    found = exact(Inputs(q, k, v, torch.ones_like(q), sinks), AttentionMask.dense(1))
    share = torch.tensor(6.0, dtype=torch.float64).exp() / (torch.tensor(6.0).double().exp() + torch.tensor(1.0).double().exp())
    assert torch.allclose(found.out.flatten(), 5 * share)
    assert found.dsinks is not None
    assert torch.allclose(found.dsinks, -5 * share * (1 - share))


def test_inputs_are_a_function_of_the_settings() -> None:
    one, again, other = (Problem("causal", 9, 1, "gqa", "fp32", seed).inputs() for seed in (0, 0, 1))
    assert torch.equal(one.q, again.q)
    assert not torch.equal(one.q, other.q)
    assert not torch.equal(one.q, one.dout)
    assert torch.equal(Problem("causal", 9, 2, "gqa", "fp32", 0).inputs().k[:1], one.k)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 1000])
def test_documents_differ_by_row_and_leave_padding(length: int) -> None:
    first, second = Problem("documents", length, 2, "mha", "fp32", 0).attention_mask().documents
    assert first[-1] == length
    assert second[-1] < length or length == 1
    assert first != second or length == 1
