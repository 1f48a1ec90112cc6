"""The settings part of `lctrain COMMAND --help`."""

from __future__ import annotations

from typing import Any

from lctrain.config.compose import Library
from lctrain.config.render import describe
from lctrain.console import say, table


def print_settings(schema: Any, root: str) -> None:
    """The config groups that `root` chooses from, then every setting with its default and meaning."""
    library = Library()
    chosen = library.defaults(root)
    if chosen:
        say("\nConfig groups (group=choice):\n")
        for group, choice in chosen.items():
            others = [name for name in library.choices(group) if name != choice]
            say(f"  {group}={choice or 'null'}" + (f"  (or {', '.join(others)})" if others else ""))
    say("\nSettings (name=value):\n")
    table(("setting", "default", "meaning"), [(name, default, doc) for name, _, default, doc in describe(schema)])
