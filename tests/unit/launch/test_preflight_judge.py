"""Which nodes are broken, which are slow, and what follows."""

import dataclasses

import pytest

from lctrain.config.launcher import PreflightConfig
from lctrain.launch.preflight_judge import Measurement, Problem, judge, verdict_of

GOOD = Measurement("n1", {"torch": "2.13", "gpus": "8"}, 100.0, 500.0, 1000.0, 0.0, 10.0)
SETTINGS = PreflightConfig(min_memory_gb=8, min_disk_gb=50, max_clock_skew_s=1, slow_fraction=0.6)


def nodes(count: int, **odd) -> list[Measurement]:
    """`count` equal nodes, and a last one that differs."""
    good = [dataclasses.replace(GOOD, node=f"n{number}") for number in range(1, count + 1)]
    return [*good, dataclasses.replace(GOOD, node="odd", **odd)]


@pytest.mark.parametrize(
    ("odd", "what", "broken"),
    [
        ({"versions": {"torch": "2.11", "gpus": "8"}}, "torch is 2.11, on most nodes 2.13", True),
        ({"versions": {"torch": "2.13"}}, "gpus is none, on most nodes 8", True),
        ({"memory_gb": 7.9}, "7.9 GB of memory are free, launcher.preflight.min_memory_gb=8", True),
        ({"disk_gb": 0.0}, "0.0 GB are free under the run directory, launcher.preflight.min_disk_gb=50", True),
        ({"clock_skew_s": -90.0}, "its clock is 90.0 s behind the first node's", True),
        ({"gemm_gflops": 599.0}, "matrix products: 599 GFLOP/s, the median node 1e+03", False),
        ({"link_gb_s": 0.5}, "network: 0.5 GB/s, the median node 10", False),
    ],
)
def test_one_odd_node_is_named(odd, what, broken):
    assert judge(nodes(3, **odd), [], SETTINGS) == [Problem("odd", what, broken)]


def test_equal_nodes_have_no_problem():
    assert judge(nodes(3), [], SETTINGS) == []
    assert judge([GOOD], [], SETTINGS) == []
    assert judge([dataclasses.replace(GOOD, link_gb_s=None, clock_skew_s=None)], [], SETTINGS) == []


def test_of_two_nodes_the_slower_one_is_slow():
    assert [problem.node for problem in judge(nodes(1, gemm_gflops=100.0), [], SETTINGS)] == ["odd"]


def test_a_node_that_does_not_answer_is_broken():
    assert judge(nodes(1), ["n9"], SETTINGS) == [Problem("n9", "no answer within 180 s", True)]


@pytest.mark.parametrize(
    ("broken", "slow", "action", "unfit"),
    [
        ("stop", "warn", "unfit", ("b",)),
        ("exclude", "warn", "exclude", ("b",)),
        ("exclude", "exclude", "exclude", ("b", "s")),
        ("exclude", "stop", "unfit", ("s",)),
    ],
)
def test_policies(broken, slow, action, unfit):
    problems = [Problem("b", "", True), Problem("s", "", False), Problem("b", "again", True)]
    verdict = verdict_of(problems, PreflightConfig(broken=broken, slow=slow))
    assert (verdict.action, verdict.unfit, verdict.may_start) == (action, unfit, False)


def test_slow_nodes_start_with_a_warning():
    verdict = verdict_of([Problem("s", "", False)], PreflightConfig())
    assert verdict.may_start
    assert len(verdict.problems) == 1
