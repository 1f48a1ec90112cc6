"""Walking a settings schema: what lies at a dotted path, what was probably meant, and what a field expects, in words."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo


class Kind(NamedTuple):
    """An annotation taken apart: the bare type, whether null is allowed, and its bounds."""

    core: Any
    optional: bool
    bounds: tuple[Any, ...]


def kind_of(annotation: Any, metadata: Sequence[Any] = ()) -> Kind:
    """Strip Annotated and `| None` from an annotation."""
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *extra = get_args(annotation)
        for item in extra:
            metadata = [*metadata, *(item.metadata if isinstance(item, FieldInfo) else [item])]
        return kind_of(base, metadata)
    if origin in (Union, types.UnionType):
        inner = [arm for arm in get_args(annotation) if arm is not type(None)]
        if len(inner) == 1:
            return kind_of(inner[0], metadata)._replace(optional=True)
    return Kind(annotation, False, tuple(metadata))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The settings class of an annotation, or None if it holds a plain value."""
    core = kind_of(annotation).core
    return core if isinstance(core, type) and issubclass(core, BaseModel) else None


def annotation_at(schema: type[BaseModel], path: Sequence[str]) -> Any:
    """The annotation at `path` (numbers index lists), or None where the schema has no such place."""
    annotation: Any = schema
    for name in path:
        core = kind_of(annotation).core
        section = section_of(annotation)
        if section is not None and name in section.model_fields:
            field = section.model_fields[name]
            annotation = Annotated[field.annotation, field] if field.metadata else field.annotation
        elif get_origin(core) is tuple and name.isdecimal():
            annotation = get_args(core)[0]
        else:
            return None
    return annotation


def walk(schema: type[BaseModel], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every setting below `schema`, sections included, in order of declaration (the inside of lists is left out)."""
    for name, field in schema.model_fields.items():
        yield (*at, name), field
        section = section_of(field.annotation)
        if section is not None:
            yield from walk(section, (*at, name))


def default_tree(schema: type[BaseModel]) -> dict[str, Any]:
    """The defaults as a plain tree, so that `${trainer.steps}` can be written where only the default says it."""
    tree: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        section = section_of(field.annotation)
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            tree[name] = json.loads(TypeAdapter(Any).dump_json(value))
        elif section is not None:
            tree[name] = default_tree(section)
    return tree


def closest(word: str, choices: Sequence[str], at_least: float = 0.6) -> str | None:
    """The choice most similar to `word`, if any is similar enough (0 none .. 1 equal)."""
    scores = [(_similarity(word, choice), choice) for choice in choices]
    best = max(scores, default=(0.0, ""), key=lambda pair: pair[0])
    return best[1] if best[0] >= at_least else None


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower().replace("_", ""), b.lower().replace("_", "")).ratio()


def suggestion(schema: type[BaseModel], path: Sequence[str], groups: Sequence[str] = ()) -> str:
    """What to write instead of the unknown `path`: one name if one is close, else the names that exist at that place."""
    corrected = _correct(schema, path, groups)
    if corrected:
        return f"did you mean {corrected}?"
    place: type[BaseModel] | None = schema
    known: list[str] = []
    for name in path:
        if place is None or name not in place.model_fields:
            break
        known.append(name)
        place = section_of(place.model_fields[name].annotation)
    if place is None:
        return f"{'.'.join(known)} is a single value"
    where = ".".join(known) or "the top level"
    return f"{where} has {', '.join(place.model_fields)}"


def _correct(schema: type[BaseModel], path: Sequence[str], groups: Sequence[str]) -> str | None:
    """First repair each name where it stands; then look for the last name anywhere in the schema."""
    repaired: list[str] = []
    for name in path:
        annotation = annotation_at(schema, repaired)
        section = section_of(annotation)
        extra = list(groups) if not repaired else []
        if section is None:
            next_name = name if name.isdecimal() and annotation_at(schema, [*repaired, name]) else None
        elif name in section.model_fields:
            next_name = name
        else:
            # Names beside each other are few, so a weak resemblance already points at one of them.
            next_name = closest(name, [*section.model_fields, *extra], at_least=0.6 if len(path) == 1 else 0.4)
        if next_name is None:
            break
        repaired.append(next_name)
    if len(repaired) == len(path):
        return ".".join(repaired)
    leaves: dict[str, str] = {}
    for place, _ in walk(schema):
        leaves.setdefault(place[-1], ".".join(place))
    leaf = closest(path[-1], list(leaves), at_least=0.7)
    return leaves[leaf] if leaf else None


def expectation(annotation: Any) -> str:
    """What a value must be, in words: `a whole number above 0`, `one of ring, all_gather`."""
    core, optional, bounds = kind_of(annotation)
    section = section_of(core)
    if section is not None:
        text = f"a section with {', '.join(section.model_fields)}"
    elif get_origin(core) is Literal:
        text = f"one of {', '.join(str(choice) for choice in get_args(core))}"
    elif get_origin(core) in (Union, types.UnionType):
        arms = [arm for arm in get_args(core) if arm is not type(None)]
        text, optional = " or ".join(map(expectation, arms)), type(None) in get_args(core)
    elif get_origin(core) is dict:
        text = "a mapping"
    elif get_origin(core) is tuple:
        inner = section_of(get_args(core)[0])
        text = "a list" + (f" of sections with {', '.join(inner.model_fields)}" if inner else "")
    else:
        text = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}.get(core, str(core))
    if any(isinstance(bound, annotated_types.MinLen) and bound.min_length for bound in bounds):
        text += ", not empty"
    limits = [limit for limit in map(_limit, bounds) if limit]
    return text + (f" {' and '.join(limits)}" if limits else "") + (", or null" if optional else "")


def _limit(bound: Any) -> str:
    for kind, attribute, words in (
        (annotated_types.Gt, "gt", "above"),
        (annotated_types.Ge, "ge", "at least"),
        (annotated_types.Lt, "lt", "below"),
        (annotated_types.Le, "le", "at most"),
    ):
        if isinstance(bound, kind):
            return f"{words} {getattr(bound, attribute)}"
    return ""
