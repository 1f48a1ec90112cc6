"""From configs/<root>.yaml and the arguments of a command to typed settings: the one way in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from lctrain.config.arguments import HelpRequested, sort_arguments
from lctrain.config.compose import Library, one_line
from lctrain.config.decode import decode, missing
from lctrain.config.fields import annotation_at, closest, default_tree, section_of, suggestion
from lctrain.config.overrides import Argument, Assignment, assignment, split
from lctrain.config.provenance import source_of
from lctrain.errors import UserError

T = TypeVar("T", bound=BaseModel)


def load(schema: type[T], root: str, overrides: list[str], config_dir: str | None = None) -> T:
    """Compose configs/<root>.yaml with the overrides and decode it strictly.

    Args:
        schema: what the result must be.
        root: name of the config to start from; where no such YAML file exists, the schema's defaults are the start.
        overrides: arguments as typed: `name=value`, `group=choice`, `~name`, `--config-dir DIR`, `--help`.
        config_dir: a folder of further configs, searched before the package's own.

    Raises:
        UserError: one line per mistake, with its source and a did-you-mean.
        HelpRequested: `--help` was among the overrides.
    """
    arguments = sort_arguments(overrides)
    if arguments.help:
        raise HelpRequested(schema, root)
    library = Library(arguments.config_dir or config_dir)
    groups, defaults = library.groups(), library.defaults(root)

    choices: list[str] = []
    assignments: list[Assignment] = []
    for argument in map(split, arguments.overrides):
        if _is_group(argument, schema, groups):
            choices += _choice(argument, library, defaults)
        else:
            _check_known(argument, schema, groups, defaults)
            assignments.append(assignment(argument, schema))

    tree = OmegaConf.merge(default_tree(schema), library.compose(root, choices))
    assert isinstance(tree, DictConfig)
    for item in assignments:
        _apply(tree, item)
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {one_line(error)}") from None
    for path in _unset(plain):
        if annotation_at(schema, path) is not None:
            raise UserError(missing(schema, path))
    return decode(schema, plain, lambda path: source_of(path, assignments, library.files(root, choices)))


def _is_group(argument: Argument, schema: type[BaseModel], groups: list[str]) -> bool:
    """Whether `name=choice` picks a file of a group (a group's name may also be a plain setting of another schema)."""
    group = argument.key.partition("@")[0]
    if group not in groups or (argument.raw or "").lstrip().startswith("{"):
        return False
    annotation = annotation_at(schema, [group])
    return annotation is None or section_of(annotation) is not None


def _choice(argument: Argument, library: Library, defaults: dict[str, str | None]) -> list[str]:
    """The group override in the form that Hydra wants: `+` exactly where the root's defaults list lacks the group."""
    group = argument.key.partition("@")[0]
    if argument.sign == "~" or argument.raw == "null":
        return [f"~{argument.key}"] if defaults.get(argument.key) is not None else []
    choices = library.choices(group)
    if argument.raw not in choices:
        meant = closest(argument.raw or "", choices)
        hint = f"did you mean {group}={meant}? " if meant else ""
        raise UserError(f"{argument.text}: group {group} has no {argument.raw!r}; {hint}choices: {', '.join(choices)}")
    return [f"{'' if argument.key in defaults else '+'}{argument.key}={argument.raw}"]


def _check_known(argument: Argument, schema: type[BaseModel], groups: list[str], defaults: dict[str, str | None]) -> None:
    if "/" in argument.key or "@" in argument.key:
        meant = closest(argument.key, groups)
        hint = f"did you mean {meant}?" if meant else f"groups: {', '.join(groups)}"
        raise UserError(f"unknown config group {argument.key} (argument {argument.text}): {hint}")
    path = argument.key.split(".")
    if annotation_at(schema, path) is None:
        hint = suggestion(schema, path, list(defaults))
        raise UserError(f"unknown setting {argument.key} (argument {argument.text}): {hint}")


def _apply(tree: DictConfig, item: Assignment) -> None:
    try:
        if not item.delete:
            OmegaConf.update(tree, ".".join(item.path), item.value, merge=True, force_add=True)
            return
        *parents, last = item.path
        holder = OmegaConf.select(tree, ".".join(parents)) if parents else tree
        if isinstance(holder, ListConfig):
            del holder[int(last)]
        elif isinstance(holder, DictConfig) and last in holder:
            del holder[last]
        else:
            raise UserError(f"{item.text}: {'.'.join(item.path)} is not set in the config files, so there is nothing to remove")
    except (OmegaConfBaseException, IndexError) as error:
        raise UserError(f"{item.text}: {one_line(error)}") from None


def _unset(tree: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the mandatory values, `???` in YAML, that nobody has given."""
    if tree == "???":
        yield at
    elif isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _unset(value, (*at, str(name)))
