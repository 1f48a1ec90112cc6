"""The matrix: nothing is left out, and every case can be run alone."""

from __future__ import annotations

import itertools

import pytest

from lctrain.config.load import load
from lctrain.config.verify import AttentionVerifyConfig
from lctrain.errors import UserError
from lctrain.parallel.strategies import STRATEGIES
from lctrain.parallel.strategy import NAMES
from lctrain.verify.matrix import Case, cases, problems, variants


def every_case(config: AttentionVerifyConfig) -> list[Case]:
    return [case for i, p in enumerate(problems(config)) for cp in config.cp for case in cases(config, i, p, cp)]


def test_every_combination_is_there() -> None:
    config = AttentionVerifyConfig()
    found = {
        (c.strategy.name, c.cp, p.mask, p.heads, p.length, p.dtype, p.batch) for c in every_case(config) for p in [c.problem]
    }
    settings = (config.cp, config.masks, config.heads, config.lengths, config.dtypes, config.batch)
    assert found == set(itertools.product(NAMES, *settings))


def test_four_ranks_take_every_kind_of_usp_in_both_nestings() -> None:
    found = {v for v in variants(AttentionVerifyConfig(), 4) if v.startswith("usp")}
    assert found == {f"usp-2-{ring}-{nesting}" for ring in STRATEGIES for nesting in ("inner", "outer")}
    assert {v for v in variants(AttentionVerifyConfig(), 6) if v.startswith("double_ring")} == {
        "double_ring-2",
        "double_ring-3",
    }


@pytest.mark.parametrize("cp", [1, 2, 3, 4, 6])
def test_no_variant_fails_to_fit(cp: int) -> None:
    for variant in variants(AttentionVerifyConfig(), cp):
        case = Case(problems(AttentionVerifyConfig())[0], cp, variant, "zigzag")
        assert case.strategy.group_size(cp, 4) in (1, *(n for n in range(2, cp + 1) if cp % n == 0))


def test_layouts_take_turns_so_that_each_mask_and_strategy_meets_all() -> None:
    config = AttentionVerifyConfig(cp=(4,), lengths=(64,))
    met = {(c.problem.mask, c.variant, c.layout) for c in every_case(config)}
    assert met == set(itertools.product(config.masks, variants(config, 4), config.layouts))
    crossed = every_case(config.model_copy(update={"cross_layouts": True}))
    assert len(crossed) == 4 * len(every_case(config))


def test_quick_meets_every_setting() -> None:
    config = AttentionVerifyConfig(quick=True)
    found = every_case(config)
    assert 100 < len(found) < 400
    for name, values in (("mask", config.masks), ("heads", config.heads), ("dtype", config.dtypes), ("batch", config.batch)):
        assert {getattr(case.problem, name) for case in found} == set(values)
    assert {case.problem.length for case in found} == {1, 7, 64, 200}
    assert {case.strategy.name for case in found if case.cp == 4} == set(NAMES)
    assert {case.layout for case in found} == set(config.layouts)


def test_command_runs_the_case_alone() -> None:
    for case in every_case(AttentionVerifyConfig(seed=3))[::1009]:
        _, command, sub, *overrides = case.command().split()
        assert (command, sub) == ("verify", "attention")
        assert every_case(load(AttentionVerifyConfig, "verify_attention", overrides)) == [case]


def test_unknown_strategy() -> None:
    with pytest.raises(UserError, match="strategies=rnig: there are ring, "):
        variants(AttentionVerifyConfig(strategies=("rnig",)), 4)
