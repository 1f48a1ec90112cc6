"""Pipeline stages: the pattern's own cuts, or balanced by cost."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctrain.config.model import ModelConfig
from lctrain.models.cuts import stage_layers
from lctrain.models.pattern import parse_pattern, pipeline_cuts


def model(pattern: str) -> ModelConfig:
    return ModelConfig(pattern=pattern, d_model=16, vocab_size=8)


def best(costs: list[float], stages: int) -> float:
    """Cost of the costliest stage in the best of all ways to cut, by trying them all."""
    ways = itertools.combinations(range(1, len(costs)), stages - 1)
    return min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *way, len(costs)))) for way in ways)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 7), st.integers(0, 20))
def test_no_way_to_cut_has_a_cheaper_costliest_stage(costs: list[int], stages: int, head: int) -> None:
    stages = min(stages, len(costs))
    pieces = stage_layers(model("-" * len(costs)), stages, costs, head)
    assert [place for piece in pieces for place in piece] == list(range(len(costs)))
    assert len(pieces) == stages
    assert all(pieces)
    weighed = [*costs[:-1], costs[-1] + head]
    assert max(sum(weighed[place] for place in piece) for piece in pieces) == best(weighed, stages)


def test_a_large_head_leaves_few_layers_on_its_stage() -> None:
    assert stage_layers(model("-" * 8), 2, [1.0] * 8, 4.0) == [range(0, 6), range(6, 8)]


def test_the_patterns_cuts_are_kept() -> None:
    assert stage_layers(model("*-|*-*-|-"), 3, [1.0] * 7, 0.0) == [range(0, 2), range(2, 6), range(6, 7)]
    assert stage_layers(model("*-|*-*-|-"), 1, [1.0] * 7, 0.0) == [range(0, 7)]


def test_cuts_are_no_sublayers() -> None:
    assert pipeline_cuts("(*-|){2}-") == (2, 4)
    assert [layer.symbol for layer in parse_pattern("(*-|){2}-")] == list("*-*--")
    assert pipeline_cuts("*-") == ()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("|*-", "no sublayer before"),
        ("*||-", "no sublayer before"),
        ("(*-|){2}", "no sublayer after"),
        ("|", "no sublayer before"),
    ],
)
def test_a_cut_that_cuts_nothing_off_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_cuts(pattern)
