"""Commands with a second word: `lctrain data prepare`, `lctrain bench attention`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping

from lctrain.config.arguments import HelpRequested
from lctrain.errors import UserError

Subcommand = Callable[[list[str]], int]


def subcommands(command: str, table: Mapping[str, Subcommand], args: list[str]) -> int:
    """Run the function that `args[0]` names with the remaining arguments; its docstring is its help."""
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, table))
        print(f"usage: lctrain {command} {{{','.join(table)}}} [name=value ...]\n")
        for name, function in table.items():
            print(f"  {name:<{width}}  {_doc(function).partition(chr(10))[0]}")
        print(f"\nlctrain {command} NAME --help shows its usage and settings.")
        return 0
    name, *rest = args
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
        hint = f"did you mean lctrain {command} {close[0]}?" if close else f"there are {', '.join(table)}"
        raise UserError(f"unknown command {command} {name}: {hint}")
    try:
        return table[name](rest)
    except HelpRequested as request:
        request.usage = request.usage or _doc(table[name])
        raise


def _doc(function: Subcommand) -> str:
    return inspect.getdoc(function) or ""
