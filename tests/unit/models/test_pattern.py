"""The pattern string."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lctrain.models.pattern import SYMBOLS, parse_pattern


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("*", "*"),
        ("*-", "*-"),
        ("(*-){3}", "*-*-*-"),
        ("(W-){2}*-", "W-W-*-"),
        ("W{3}", "WWW"),
        ("((*-){2}W){2}", "*-*-W*-*-W"),
        ("(*-)", "*-"),
        ("*{1}(-)", "*-"),
        ("-{12}", "-" * 12),
    ],
)
def test_expansion(pattern: str, expanded: str) -> None:
    layers = parse_pattern(pattern)
    assert "".join(layer.symbol for layer in layers) == expanded
    assert [layer.place for layer in layers] == list(range(len(expanded)))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "pattern is empty"),
        ("()", "pattern is empty"),
        ("*Q-", r"unknown symbol 'Q' at character 2; known are \* \(attention\), W \(windowed attention\), "),
        ("* -", "unknown symbol ' ' at character 2"),
        ("(*-", r"a '\(' is never closed"),
        ("((*)", r"a '\(' is never closed"),
        ("*)-", r"unexpected '\)' at character 2"),
        (")", r"unexpected '\)' at character 1"),
        ("*{0}", "a repeat is written {n} with n at least 1"),
        ("*{}", "a repeat is written {n}"),
        ("*{-2}", "a repeat is written {n}"),
        ("*{2", "a repeat is written {n}"),
        ("*{1.5}", "a repeat is written {n}"),
        ("{2}*", "unknown symbol '{' at character 1"),
        ("*{2}{2}", "unknown symbol '{' at character 5"),
    ],
)
def test_what_does_not_parse_is_pointed_at(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern)


trees = st.recursive(
    st.sampled_from(sorted(SYMBOLS)),
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(1, 3)),
    max_leaves=8,
)


def write(tree) -> str:
    return tree if isinstance(tree, str) else f"({''.join(map(write, tree[0]))}){{{tree[1]}}}"


def expand(tree) -> str:
    return tree if isinstance(tree, str) else "".join(map(expand, tree[0])) * tree[1]


@given(st.lists(trees, min_size=1, max_size=3))
def test_any_pattern_means_its_expansion(items) -> None:
    pattern, expanded = "".join(map(write, items)), "".join(map(expand, items))
    assert parse_pattern(pattern) == parse_pattern(expanded)
    assert "".join(layer.symbol for layer in parse_pattern(pattern)) == expanded


@given(st.text(alphabet="*W-(){}012x", max_size=8))
def test_nothing_but_value_errors(pattern: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_pattern(pattern)
