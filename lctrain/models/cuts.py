"""Where a model is cut into pipeline stages: at the pattern's `|`, or so that the costliest stage costs least."""

from __future__ import annotations

from collections.abc import Sequence

from lctrain.config.model import ModelConfig
from lctrain.models.pattern import parse_pattern, pipeline_cuts


def stage_layers(config: ModelConfig, stages: int, costs: Sequence[float], head_cost: float) -> list[range]:
    """Places of the sublayers of each of `stages` consecutive pieces.

    costs: of every sublayer, such as its FLOPs. head_cost: of the output projection, which the last piece carries as well.
    The pattern's own cuts, if it has any, must make `stages` pieces (checked with the config).
    """
    given = pipeline_cuts(config.pattern)
    if given and stages > 1:
        ends = [*given, len(parse_pattern(config.pattern))]
        assert len(ends) == stages, (config.pattern, stages)
        return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    assert 0 < stages <= len(costs), (stages, len(costs))
    weighed = [*costs[:-1], costs[-1] + head_cost]
    low, high = max(weighed), sum(weighed)
    for _ in range(60):  # the least limit under which the pieces are few enough, by halving
        middle = (low + high) / 2
        low, high = (low, middle) if len(_pieces(weighed, middle)) <= stages else (middle, high)
    pieces = _pieces(weighed, high)
    while len(pieces) < stages:  # more stages than the costliest sublayers need: halve the costliest piece that can be
        at = max((i for i, piece in enumerate(pieces) if len(piece) > 1), key=lambda i: sum(weighed[j] for j in pieces[i]))
        middle_place = pieces[at].start + len(pieces[at]) // 2
        pieces[at : at + 1] = [range(pieces[at].start, middle_place), range(middle_place, pieces[at].stop)]
    return pieces


def _pieces(costs: Sequence[float], limit: float) -> list[range]:
    """As few consecutive pieces as keep to the limit, filled from the end: the first, which also embeds, gets the rest."""
    pieces: list[range] = []
    stop, total = len(costs), 0.0
    for place in range(len(costs) - 1, -1, -1):
        if total and total + costs[place] > limit:
            pieces.append(range(place + 1, stop))
            stop, total = place + 1, 0.0
        total += costs[place]
    return [range(0, stop), *reversed(pieces)]
