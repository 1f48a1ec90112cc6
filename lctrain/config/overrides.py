"""An argument such as `trainer.steps=3`, `+a.b=c`, `~tracking` or `model=tiny`, read with the schema at hand.

Hydra's grammar reads the value. Where it cannot, or where the field is text anyway, the value is the text as typed: nobody
should have to know a second quoting language to pass a prompt or a path.
"""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from pydantic import BaseModel

from lctrain.config.fields import annotation_at, kind_of
from lctrain.errors import UserError

ARGUMENT = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^\s=+~'\"]+)(=(?P<value>.*))?", re.DOTALL)


class Argument(NamedTuple):
    """A split argument: `sign` is '', '+', '++' or '~'; `raw` is None where there is no '='."""

    text: str
    sign: str
    key: str
    raw: str | None


class Assignment(NamedTuple):
    """A setting to write (or, with delete, to remove) and the argument that asked for it."""

    text: str
    path: tuple[str, ...]
    value: Any
    delete: bool = False


def split(text: str) -> Argument:
    """Take an argument apart; UserError where it is none."""
    match = ARGUMENT.fullmatch(text)
    if match is None or (match["value"] is None and match["sign"] != "~"):
        raise UserError(f"cannot read {text!r}: write a setting as name=value, as in trainer.steps=100")
    return Argument(text, match["sign"] or "", match["key"], match["value"])


def assignment(argument: Argument, schema: type[BaseModel]) -> Assignment:
    """The value of an argument, shaped for the schema's field at that place (which must exist)."""
    path = tuple(argument.key.split("."))
    if argument.sign == "~":
        return Assignment(argument.text, path, None, delete=True)
    annotation = annotation_at(schema, path)
    assert annotation is not None
    assert argument.raw is not None
    return Assignment(argument.text, path, _shaped(argument, argument.raw, annotation))


def _shaped(argument: Argument, raw: str, annotation: Any) -> Any:
    core, optional, _ = kind_of(annotation)
    override = _parsed(raw)
    is_sweep = override is not None and override.is_sweep_override()
    if get_origin(core) is tuple:
        return _list(raw, override, is_text=kind_of(get_args(core)[0]).core is str)
    if core is str or (get_origin(core) is Literal and all(isinstance(choice, str) for choice in get_args(core))):
        return _text(raw, override, optional)
    if is_sweep:
        raise UserError(f"{argument.text}: {argument.key} takes one value, not several")
    return override.value() if override is not None else literal(raw)


def _text(raw: str, override: Override | None, optional: bool) -> Any:
    if override is None or override.is_sweep_override():
        return literal(raw)
    value = override.value()
    if value is None and optional:
        return None
    quoted = raw.strip()[:1] in ("'", '"')
    return value if isinstance(value, str) and (quoted or "${" in value) else literal(raw)


def _list(raw: str, override: Override | None, is_text: bool) -> Any:
    if override is None:
        return [literal(raw)]
    if override.is_sweep_override():
        sweep = override._value
        if not (isinstance(sweep, ChoiceSweep) and sweep.simple_form):
            return [literal(raw)]
        values: Any = _elements(raw)
    else:
        values = override.value()
        if isinstance(values, str) and values.startswith("${"):
            return values
        if values is None:
            return None
        if not isinstance(values, list):
            return [_text(raw, override, optional=False) if is_text else values]
    return [str(value) if is_text and isinstance(value, int | float) else value for value in values]


def _elements(raw: str) -> list[Any]:
    """`a,b` as the list [a, b]."""
    inner = _parsed(f"[{raw}]")
    assert inner is not None
    values = inner.value()
    assert isinstance(values, list)
    return values


def _parsed(raw: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(f"key={raw}")
    except HydraException:
        return None


def literal(text: str) -> str:
    r"""The text itself in a tree that resolves `${...}`: each interpolation is escaped, and so are backslashes before it."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
