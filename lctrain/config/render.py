"""Settings as YAML: plain, for machines and run directories, or with every field's meaning beside it, for people."""

from __future__ import annotations

import re
import textwrap
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lctrain.config.decode import decode
from lctrain.config.fields import expectation, section_of, walk
from lctrain.errors import UserError

T = TypeVar("T", bound=BaseModel)
COMMENT_COLUMN = 40
WIDTH = 120


class _Dumper(yaml.SafeDumper):
    """YAML 1.1 reads 1e-3 as text; this pair of classes agrees with JSON and people that it is a number."""


class _Loader(yaml.SafeLoader):
    """See _Dumper."""


for _side in (_Dumper, _Loader):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), list("-+0123456789"))

# Line breaks and control characters survive only in YAML's double quotes, and then on one line.
_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')
)


def to_yaml(config: BaseModel) -> str:
    """All settings, defaults included; from_yaml gives back an equal object."""
    return _dump(config.model_dump(mode="json"))


def load_yaml(text: str) -> Any:
    """The tree of a YAML or JSON document, with `1e-3` a number; yaml.YAMLError if it is none."""
    return yaml.load(text, _Loader)


def from_yaml(schema: type[T], text: str) -> T:
    """The settings that to_yaml (or render) wrote; UserError for anything that the schema does not allow."""
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {' '.join(str(error).split())}") from None
    return decode(schema, tree)


def render(config: BaseModel) -> str:
    """YAML with each setting's one-line doc as a comment; where a value differs from the default, the default follows."""
    return "\n".join(_section(config, "")) + "\n"


def describe(schema: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """(dotted name, what it must be, default or '', doc) of every setting that holds a value."""
    rows = []
    for path, field in walk(schema):
        if section_of(field.annotation) is None:
            default = "" if _default(field) is PydanticUndefined else _scalar(_plain(_default(field)))
            rows.append((".".join(path), expectation(annotated(field)), default, doc(field)))
    return rows


def annotated(field: FieldInfo) -> Any:
    """A field's annotation with its bounds."""
    return Annotated[field.annotation, field] if field.metadata else field.annotation


def doc(field: FieldInfo) -> str:
    """A field's docstring on one line."""
    return " ".join((field.description or "").split())


def _section(config: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            lines += ["", f"{indent}# {doc(field)}"] if not indent else [f"{indent}# {doc(field)}"]
            lines += [f"{indent}{name}:", *_section(value, indent + "  ")]
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            lines += [f"{indent}# {doc(field)}", f"{indent}{name}:"]
            for item in value:
                first, *rest = _section(item, indent + "    ")
                lines += [f"{indent}  - {first.lstrip()}", *rest]
        else:
            default = _default(field)
            note = doc(field)
            if default is not PydanticUndefined and default != value:
                note += f" [default: {_scalar(_plain(default))}]"
            lines += _beside(f"{indent}{name}: {_scalar(_plain(value))}", note)
    return lines


def _beside(setting: str, note: str) -> list[str]:
    """The setting with its comment to the right, over as many lines as the comment needs."""
    first, *rest = textwrap.wrap(note, WIDTH - COMMENT_COLUMN - 3) or [""]
    blank = " " * COMMENT_COLUMN
    return [f"{setting:<{COMMENT_COLUMN}} # {first}", *(f"{blank} # {line}" for line in rest)]


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _scalar(value: Any) -> str:
    """A value on one line."""
    return _dump(value, flow=True).removesuffix("\n...\n").removesuffix("\n").removesuffix("\n...")


def _dump(value: Any, flow: bool | None = False) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9, default_flow_style=flow)
