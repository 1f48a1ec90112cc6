"""Strategy: degrees, their defaults, and what does not fit."""

from __future__ import annotations

import pytest

from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.strategy import NAMES, Strategy


def test_names() -> None:
    assert NAMES == ("ring", "bidirectional_ring", "double_ring", "token_ring", "all_gather", "ulysses", "usp")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "flash"}, "unknown attention strategy 'flash': choose one of ring, .*, ulysses, usp"),
        ({"name": "usp", "ring": "ulysses"}, "unknown ring 'ulysses' of usp: choose one of ring, "),
        ({"name": "usp", "nesting": "both"}, "nesting is inner or outer, not 'both'"),
    ],
)
def test_refuses(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Strategy(**settings)


@pytest.mark.parametrize(
    ("strategy", "world", "kv_heads", "size"),
    [
        (Strategy("ring"), 8, 4, 1),
        (Strategy("double_ring", node=2), 8, 4, 1),
        (Strategy("ulysses"), 8, 4, 8),
        (Strategy("usp"), 8, 4, 4),
        (Strategy("usp"), 8, 8, 4),  # a proper divisor: 8 would be Ulysses
        (Strategy("usp"), 6, 4, 2),
        (Strategy("usp"), 8, 1, 1),
        (Strategy("usp"), 7, 7, 1),
        (Strategy("usp"), 1, 4, 1),
        (Strategy("usp", ulysses=8), 8, 1, 8),
    ],
)
def test_group_size(strategy: Strategy, world: int, kv_heads: int, size: int) -> None:
    assert strategy.group_size(world, kv_heads) == size


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match="usp: 6 ranks are not a multiple of ulysses=4"):
        Strategy("usp", ulysses=4).group_size(6, 4)


def test_nesting() -> None:
    layout = SequenceLayout("zigzag", 8, 64)
    assert Strategy("usp", ulysses=4).grouped(layout, 4).groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert Strategy("usp", ulysses=4, nesting="outer").grouped(layout, 4).groups == ((0, 2, 4, 6), (1, 3, 5, 7))


def test_schedule_between_groups() -> None:
    assert Strategy("usp", ring="token_ring").schedule_name() == "token_ring"
    assert Strategy("ulysses").schedule_name() == "ring"
    assert Strategy("all_gather").schedule_name() == "all_gather"


@pytest.mark.parametrize(("node", "world", "size"), [(None, 16, 4), (None, 6, 2), (4, 8, 4), (8, 4, 4), (4, 6, 2), (1, 4, 1)])
def test_node_size(node: int | None, world: int, size: int) -> None:
    """A node larger than what is left between the groups of usp shrinks to fit."""
    assert Strategy("double_ring", node=node).node_size(world) == size
