"""The strict step: a plain tree becomes frozen typed objects, or a few lines that say what does not fit and where it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lctrain.config.fields import annotation_at, closest, expectation, kind_of, suggestion
from lctrain.errors import UserError

T = TypeVar("T", bound=BaseModel)
SHOWN = 4
"""Mistakes reported at once."""


def decode(schema: type[T], tree: Any, source: Callable[[Sequence[str]], str | None] = lambda path: None) -> T:
    """The typed settings of `tree`; UserError with one line per mistake.

    Args:
        source: says for a path where its value was written, or None.
    """
    try:
        # Through JSON, because only in its JSON mode does pydantic read lists as tuples and still refuse "3" for 3.
        return schema.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    # A list or section with a bad entry may be reported as bad itself; the entry tells more.
    places = [mistake["loc"] for mistake in mistakes]
    mistakes = [m for m in mistakes if not any(place != m["loc"] and place[: len(m["loc"])] == m["loc"] for place in places)]
    lines = list(dict.fromkeys(_line(schema, mistake, source) for mistake in mistakes))
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"]
    raise UserError("\n".join(lines))


def _line(schema: type[BaseModel], mistake: Any, source: Callable[[Sequence[str]], str | None]) -> str:
    path = [str(part) for part in mistake["loc"]]
    if mistake["type"] not in ("extra_forbidden", "missing"):
        while annotation_at(schema, path) is None:  # below a setting of several types pydantic adds the type's name
            path.pop()
    dotted = ".".join(path)
    origin = source(path)
    written = f" ({origin})" if origin else ""
    annotation = annotation_at(schema, path)
    match mistake["type"]:
        case "extra_forbidden":
            return f"unknown setting {dotted}{written}: {suggestion(schema, path)}"
        case "missing":
            return missing(schema, path)
        case "value_error":
            return _placed(schema, path, str(mistake["ctx"]["error"]))  # by a check of ours over several settings
    value = mistake["input"]
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    expected = expectation(annotation) if annotation is not None else mistake["msg"]
    if origin == f"argument {dotted}={shown}":
        written = ""
    return f"{dotted}={_short(shown)}{written}: must be {expected}{_meant(annotation, value)}"


def _placed(schema: type[BaseModel], path: list[str], text: str) -> str:
    """The text of a check in the section at `path`, which names settings in full or from that section on."""
    named = re.match(r"[\w.]*", text)
    name = named.group().split(".") if named else []
    if not path or name[: len(path)] == path or (name[0] in schema.model_fields and annotation_at(schema, name)):
        return text
    dotted = ".".join(path)
    return f"{dotted}.{text}" if annotation_at(schema, [*path, *name]) else f"{dotted}: {text}"


def missing(schema: type[BaseModel], path: Sequence[str]) -> str:
    """The line for a setting that has no value."""
    dotted = ".".join(path)
    section = kind_of(annotation_at(schema, path[:-1])).core
    doc = " ".join((section.model_fields[path[-1]].description or "").split())
    return f"{dotted} has no value: add {dotted}=... ({doc.rstrip('.')})"


def _meant(annotation: Any, value: Any) -> str:
    core = kind_of(annotation).core if annotation is not None else None
    if get_origin(core) is Literal and isinstance(value, str):
        choice = closest(value, [str(item) for item in get_args(core)])
        return f"; did you mean {choice}?" if choice else ""
    return ""


def _short(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
