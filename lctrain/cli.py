"""The command line: finds the command, runs it, and turns whatever goes wrong into an exit status and a readable line.

A command is a module of `lctrain/commands/` with `main(args) -> int`. Its docstring is its help: the first line stands in
the list of commands and is read without importing the module, because importing torch to print help would cost seconds.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
from pathlib import Path

from lctrain import __version__
from lctrain.config.arguments import HelpRequested
from lctrain.errors import UserError

COMMANDS = Path(__file__).parent / "commands"


def main(argv: list[str] | None = None) -> int:
    """Run `lctrain <argv>`; returns the exit status: 0 done, 2 a mistake of the user, 130 interrupted."""
    args = sys.argv[1:] if argv is None else argv
    try:
        status = _run(args)
        sys.stdout.flush()
        return status
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone. Point stdout elsewhere, or Python complains again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def command_help() -> dict[str, str]:
    """Every command with the first line of its docstring."""
    return {path.stem: _docstring(path).partition("\n")[0] for path in sorted(COMMANDS.glob("[!_]*.py"))}


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        _print_help()
        return 0
    if args[0] in ("-V", "--version"):
        print(f"lctrain {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in command_help():
        raise UserError(_unknown(name))
    try:
        return importlib.import_module(f"lctrain.commands.{name}").main(rest)
    except HelpRequested as request:
        from lctrain.help import print_settings

        print(request.usage or _docstring(COMMANDS / f"{name}.py"))
        if request.schema is not None:
            print_settings(request.schema, request.root)
        return 0


def _unknown(name: str) -> str:
    import difflib

    if name.startswith("-"):
        return f"unknown option {name}: there are --help and --version"
    close = difflib.get_close_matches(name, command_help(), n=1, cutoff=0.5)
    hint = f"did you mean lctrain {close[0]}?" if close else f"commands: {', '.join(command_help())}"
    return f"unknown command {name}: {hint}"


def _print_help() -> None:
    print("usage: lctrain COMMAND [name=value ...] [--config-dir DIR]\n")
    print("Train language models on very long sequences over many processes.\n")
    width = max(map(len, command_help()))
    for name, line in command_help().items():
        print(f"  {name:<{width}}  {line}")
    print("\nlctrain COMMAND --help shows a command's usage and settings.")


def _docstring(path: Path) -> str:
    return inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
