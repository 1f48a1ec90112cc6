"""The arguments of a command: overrides (`name=value`) and the two options that every command understands.

Imports nothing heavy: the start of the command line goes through here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lctrain.errors import UserError


class HelpRequested(Exception):
    """`--help` stood among a command's arguments: the command line prints the command's usage and its settings.

    schema: the settings class, or None; root: its config; usage: set by a subcommand, else the command's docstring is used.
    """

    def __init__(self, schema: Any, root: str, usage: str | None = None) -> None:
        super().__init__(root)
        self.schema = schema
        self.root = root
        self.usage = usage


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


def no_arguments(args: list[str]) -> None:
    """For commands without settings: HelpRequested for `--help`, UserError for anything else."""
    arguments = sort_arguments(args)
    if arguments.help:
        raise HelpRequested(None, "")
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: this command takes no settings")
