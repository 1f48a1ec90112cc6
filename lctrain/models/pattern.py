"""The pattern string: one symbol per residual sublayer, with repeats, parsed into layer specs.

Grammar (a superset of megatron-core's hybrid pattern):

    pattern = item+ ;  item = (symbol | "|" | "(" pattern ")") ["{" count "}"]

`|` is no sublayer: a pipeline stage ends there.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_LAYERS, MAX_DEPTH = 10_000, 50
"""What no model has, and only a slip of the keyboard asks for."""

SYMBOLS = {
    "*": "attention",
    "W": "windowed attention",
    "+": "latent attention",
    "M": "Mamba-2",
    "L": "linear attention",
    "-": "MLP",
    "E": "mixture of experts",
}

CUT = "|"
"""Between two sublayers: the second begins a pipeline stage."""


class LayerSpec(NamedTuple):
    """One residual sublayer: its symbol and its place in the model, counted from 0."""

    symbol: str
    place: int


def parse_pattern(pattern: str) -> tuple[LayerSpec, ...]:
    """Expand `(*-){2}W-` into one LayerSpec per sublayer; ValueError points at the character that does not fit."""
    symbols = [symbol for symbol in _expand(pattern) if symbol != CUT]
    if not symbols:
        raise ValueError("pattern is empty: give at least one sublayer, as in '(*-){4}'")
    return tuple(LayerSpec(symbol, place) for place, symbol in enumerate(symbols))


def pipeline_cuts(pattern: str) -> tuple[int, ...]:
    """Places of the sublayers before which the pattern has a `|`: (2, 4) for `*-|*-|*-`. ValueError if one cuts nothing off."""
    cuts: list[int] = []
    layers = 0
    for symbol in _expand(pattern):
        if symbol != CUT:
            layers += 1
        elif layers == (cuts[-1] if cuts else 0):
            raise ValueError(f"model.pattern {pattern!r}: a '|' has no sublayer before it; it stands between two stages")
        else:
            cuts.append(layers)
    if cuts and cuts[-1] == layers:
        raise ValueError(f"model.pattern {pattern!r}: the last '|' has no sublayer after it; it stands between two stages")
    return tuple(cuts)


def _expand(pattern: str) -> list[str]:
    symbols, end = _items(pattern, 0, 0)
    if end != len(pattern):
        raise ValueError(f"pattern {pattern!r}: unexpected {pattern[end]!r} at character {end + 1}")
    return symbols


def _items(pattern: str, at: int, depth: int) -> tuple[list[str], int]:
    if depth > MAX_DEPTH:
        raise ValueError(f"pattern has parentheses nested deeper than {MAX_DEPTH}")
    expanded: list[str] = []
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "(":
            item, at = _items(pattern, at + 1, depth + 1)
            if at >= len(pattern):
                raise ValueError(f"pattern {pattern!r}: a '(' is never closed")
            at += 1
        elif pattern[at] in SYMBOLS or pattern[at] == CUT:
            item, at = [pattern[at]], at + 1
        else:
            known = ", ".join(f"{symbol} ({name})" for symbol, name in SYMBOLS.items())
            raise ValueError(f"pattern {pattern!r}: unknown symbol {pattern[at]!r} at character {at + 1}; known are {known}")
        count, at = _count(pattern, at)
        if len(expanded) + len(item) * count > MAX_LAYERS:
            raise ValueError(f"pattern {pattern[:60]!r} expands to more than {MAX_LAYERS:,} sublayers")
        expanded += item * count
    return expanded, at


def _count(pattern: str, at: int) -> tuple[int, int]:
    if at >= len(pattern) or pattern[at] != "{":
        return 1, at
    close = pattern.find("}", at)
    digits = pattern[at + 1 : close] if close > 0 else ""
    if not digits.isdecimal() or int(digits) == 0:
        raise ValueError(f"pattern {pattern!r}: a repeat is written {{n}} with n at least 1 (character {at + 1})")
    return int(digits), close + 1
