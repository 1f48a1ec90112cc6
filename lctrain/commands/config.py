"""Show settings: what a command would use, with the meaning of each, or which configs there are to choose from.

usage: lctrain config [ROOT [name=value ...]] [--config-dir DIR]

  lctrain config                        list roots, groups and choices
  lctrain config train model=small      print every setting of `lctrain train model=small`, resolved and documented
"""

from __future__ import annotations

from lctrain.config.arguments import HelpRequested, sort_arguments
from lctrain.errors import UserError


def main(args: list[str]) -> int:
    """Run the command."""
    if args and not args[0].startswith("-"):
        return _show(args[0], args[1:])
    arguments = sort_arguments(args)
    if arguments.help:
        raise HelpRequested(None, "")
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: name the config first, as in lctrain config train model=small")
    return _list(arguments.config_dir)


def _show(root: str, overrides: list[str]) -> int:
    from lctrain.config.fields import closest
    from lctrain.config.load import load
    from lctrain.config.render import render
    from lctrain.config.roots import ROOTS, schema_of
    from lctrain.console import say

    if root not in ROOTS:
        meant = closest(root, list(ROOTS))
        hint = f"did you mean {meant}?" if meant else f"there are {', '.join(ROOTS)}"
        raise UserError(f"no config is called {root}: {hint}")
    say(render(load(schema_of(root), root, overrides)).rstrip())
    return 0


def _list(config_dir: str | None) -> int:
    from lctrain.config.compose import Library
    from lctrain.config.roots import ROOTS
    from lctrain.console import say

    library = Library(config_dir)
    say("Configs (lctrain config NAME prints one):\n")
    for root in ROOTS:
        say(f"  {root}")
    say("\nGroups and their choices (group=choice; * is what train takes by default):\n")
    chosen = library.defaults("train")
    groups = library.groups()
    width = max(map(len, groups))
    for group in groups:
        names = [f"{name}*" if chosen.get(group) == name else name for name in library.choices(group)]
        say(f"  {group:<{width}}  {'  '.join(names)}")
    return 0
