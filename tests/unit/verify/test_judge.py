"""The judge: what is wrong is called wrong."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lctrain.parallel.cost import traffic
from lctrain.verify.exact import exact
from lctrain.verify.judge import BF16_BAR, FP32_BAR, POOLED_CASES, Verdict, judge, pooled_failures, pooled_ratio, relative
from lctrain.verify.matrix import Case
from lctrain.verify.problem import Problem
from lctrain.verify.rank import Share, layout_of

CASE = Case(Problem("sinks", 12, 1, "gqa", "fp32", 0), 2, "ring", "zigzag")
WANTED = exact(CASE.problem.inputs(), CASE.problem.attention_mask())


def shares(error: float = 0.0, **changes) -> list[Share]:
    """Two ranks' shares without a mistake, or with `changes` on the second."""
    mask = CASE.problem.attention_mask()
    case = CASE.strategy, layout_of(CASE, mask), mask, CASE.problem.shape
    errors = dict.fromkeys(("out", "dq", "dk", "dv", "lse"), (error, error**2))
    sent = [{way: traffic(*case, way, rank) for way in ("forward", "backward")} for rank in (0, 1)]
    made = [Share(errors, WANTED.dsinks / 2, sent[rank], ()) for rank in (0, 1)]
    return [made[0], made[1]._replace(**changes)]


def test_passes_what_is_right() -> None:
    verdict = judge(CASE, shares(), WANTED, None)
    assert verdict.failures == ()
    assert set(verdict.errors) == {"out", "dq", "dk", "dv", "lse", "dsinks"}
    assert max(verdict.errors.values()) == 0


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv", "lse"])
@pytest.mark.parametrize("error", [1.0, float("nan"), float("inf")])
def test_sees_a_large_error_on_any_rank(name: str, error: float) -> None:
    wrong = shares()[1].errors | {name: (error, error**2)}
    (failure,) = judge(CASE, shares(errors=wrong), WANTED, None).failures
    assert failure.startswith(f"{name} is off by ")


def test_sees_sinks_that_are_not_added_up() -> None:
    (failure,) = judge(CASE, shares(dsinks=WANTED.dsinks), WANTED, None).failures
    assert failure.startswith("dsinks is off by 5.0e-01")


def test_sees_flaws_and_bytes() -> None:
    found = shares(flaws=("NaN in dq",), sent={"forward": Counter(kv=1), "backward": shares()[1].sent["backward"]})
    flaw, wrong = judge(CASE, found, WANTED, None).failures
    assert flaw == "NaN in dq"
    assert wrong.startswith("rank 1 sent {'kv': 1} in forward, planned are ")


def test_messages_for_the_lse_are_not_of_the_schedule() -> None:
    sent = {way: count + Counter(lse=4) for way, count in shares()[1].sent.items()}
    assert judge(CASE, shares(sent=sent), WANTED, None).failures == ()


def test_bar_of_bf16_is_one_process() -> None:
    own = dict.fromkeys(("out", "dq", "dk", "dv", "lse", "dsinks"), 0.01)
    top = float(WANTED.lse[torch.isfinite(WANTED.lse)].abs().max())
    small, large = (judge(CASE, shares(errors=shares()[1].errors | {"lse": (x * top, 0)}), WANTED, own) for x in (0.015, 0.03))
    assert small.failures == ()
    assert large.failures == ("lse is off by 3.0e-02, allowed are 2.0e-02",)


def test_errors_are_relative_but_for_zeros_and_small_lse() -> None:
    assert relative("dq", torch.tensor([1.0, -4.0]), 1.0, 1.0, rms=False) == 0.25
    assert relative("dq", torch.tensor([3.0, -4.0]), 1.0, 1.0, rms=True) == pytest.approx(0.2)
    assert relative("dq", torch.zeros(2), 1e-7, 1.0, rms=False) == 1e-7
    assert relative("lse", torch.tensor([0.1, float("-inf")]), 1e-7, 1.0, rms=False) == 1e-7
    assert relative("lse", torch.tensor([4.0]), 1e-7, 1.0, rms=True) == 1e-7 / 4
    assert FP32_BAR == 2e-6


def test_pooled_ratio_needs_enough_cases() -> None:
    def verdicts(count: int, error: float) -> list[Verdict]:
        return [Verdict(CASE, {"out": error}, {"out": 0.01}, ())] * count

    assert pooled_ratio(verdicts(POOLED_CASES - 1, 0.02), "out") is None
    assert pooled_ratio(verdicts(POOLED_CASES, 0.02), "out") == pytest.approx(2.0)
    assert pooled_ratio(verdicts(POOLED_CASES, 0.02), "dq") is None
    assert pooled_failures({"out": 1.11, "dq": BF16_BAR, "dk": None}) == [
        "out: bf16 error is 1.11 times one process's own over all cases, allowed are 1.1"
    ]
