"""What `dry_run=true` and `--list` print."""

from __future__ import annotations

from collections.abc import Mapping

from lctrain.config.render import render
from lctrain.console import say, table
from lctrain.convert.families import FAMILIES
from lctrain.convert.formats import Plan
from lctrain.convert.mapping import WeightMap
from lctrain.convert.opened import Opened
from lctrain.convert.stream import Info


def list_mapping(opened: Opened, plan: Plan, infos: Mapping[str, Info]) -> None:
    """Our settings; every rule; every name that no rule knows."""
    say()
    for line in render(opened.config).splitlines():
        say(f"  {line}")
    say()
    if opened.mapping is not None:
        _rules("input", "lctrain", opened.mapping, {})
    _rules("output", "lctrain", plan.mapping, infos)
    for name in opened.unmatched:
        say(f"unmatched: {name}", style="red")
    if not opened.unmatched:
        say("every tensor of the input is matched", style="green")


def _rules(theirs: str, ours: str, mapping: WeightMap, infos: Mapping[str, Info]) -> None:
    rows = []
    for rule in mapping.rules:
        operation = "" if rule.ours == rule.theirs else type(rule.operation).__name__.lower()
        info = infos.get(rule.theirs[0])
        shape = f"{list(info.shape)} {str(info.dtype).removeprefix('torch.')}" if info else ""
        rows.append((_names(rule.theirs), _names(rule.ours), operation, shape))
    table((theirs, ours, "by", "shape"), rows)
    say()


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 5 else f"{names[0]} ... {names[-1]}"


def list_families() -> None:
    """The table of families and of what can be done with each."""
    columns, rows = families_table()
    table(columns, rows)
    for family in FAMILIES.values():
        if family.lacks:
            say(f"{family.name}: refused are {family.lacks}")


def families_table() -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows, from the tables themselves."""
    from lctrain.convert.support import blocks_of, megatron_support

    rows: list[tuple[str, ...]] = []
    for family in FAMILIES.values():
        rows.append((family.name, family.architecture, blocks_of(family), "both ways", megatron_support(family), "both ways"))
    return ("family", "transformers", "blocks", "hf", "megatron", "deepspeed"), rows
