"""The arguments of a command: overrides (`name=value`) and the two options that every command understands.

Imports nothing heavy: the start of the command line goes through here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lctrain.errors import UserError


class HelpRequested(Exception):
    """`--help` stood among a command's arguments: the command line prints the command's usage and this schema's settings."""

    def __init__(self, schema: Any, root: str) -> None:
        super().__init__(root)
        self.schema = schema
        self.root = root


class Arguments(NamedTuple):
    """A command's arguments, sorted."""

    overrides: list[str]
    config_dir: str | None
    help: bool


def sort_arguments(args: list[str]) -> Arguments:
    """Separate overrides from `--config-dir DIR` (or `--config-dir=DIR`) and `--help`; UserError for any other option."""
    overrides: list[str] = []
    config_dir, wants_help = None, False
    rest = iter(args)
    for arg in rest:
        if arg in ("-h", "--help"):
            wants_help = True
        elif arg == "--config-dir":
            config_dir = next(rest, None)
            if config_dir is None:
                raise UserError("--config-dir needs a folder: --config-dir my_configs")
        elif arg.startswith("--config-dir="):
            config_dir = arg.partition("=")[2]
        elif arg.startswith("-"):
            name = arg.lstrip("-")
            hint = f"; settings have no dashes: {name}" if "=" in name else ""
            raise UserError(f"unknown option {arg}: there are --config-dir DIR and --help{hint}")
        else:
            overrides.append(arg)
    return Arguments(overrides, config_dir, wants_help)
