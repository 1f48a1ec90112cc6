"""`lctrain verify blocks`: every block on one process against its oracle.

A block's checks live in a module of this package that exports `cases() -> iterable of (name, callable -> errors by tensor)`.
An error is relative, largest difference over largest entry; a case that cannot run here raises Skipped.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import time
from typing import Any, NamedTuple

import torch

from lctrain.config.verify import BlocksVerifyConfig
from lctrain.console import counted, progress, say, table
from lctrain.environment import describe_environment
from lctrain.errors import UserError
from lctrain.verify.blocks.compare import Case
from lctrain.verify.blocks.huggingface import Skipped
from lctrain.verify.output import finite, store_report
from lctrain.whole_file import check_output

BAR = 1e-5
"""Largest relative error in fp32."""
QUICK = 4
"""quick=true runs every so many-th case of a block."""


class Verdict(NamedTuple):
    """What came of one case: errors by tensor, why it was skipped, or the exception that it raised."""

    block: str
    number: int
    name: str
    errors: dict[str, float]
    seconds: float
    skipped: str | None = None
    raised: str | None = None

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor with the largest error; NaN is larger than anything."""
        return max(self.errors.items(), key=lambda entry: math.inf if math.isnan(entry[1]) else entry[1], default=("", 0.0))

    @property
    def failed(self) -> bool:
        """Whether an error is too large, or there is none to tell."""
        return self.skipped is None and (self.raised is not None or not self.errors or not self.worst[1] <= BAR)


def verify_blocks(config: BlocksVerifyConfig) -> int:
    """Run the cases, print the report; returns 1 if any fails."""
    check_output("output", config.output)
    chosen = _chosen(config)
    say(f"{counted(len(chosen), 'case')}, fp32, one process: outputs and all gradients, relative error at most {BAR:.0e}")
    verdicts = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are tiny: more threads only wait for each other
    with progress("verify blocks", len(chosen), "cases") as advance:
        for block, number, case in chosen:
            verdicts.append(_run(block, number, case))
            advance(1)
    torch.set_num_threads(threads)
    _print(verdicts)
    _store(config, verdicts)
    return int(any(verdict.failed for verdict in verdicts))


def blocks() -> dict[str, list[Case]]:
    """All cases by block."""
    found = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        cases = getattr(importlib.import_module(f"{__name__}.{module}"), "cases", None)
        if cases is not None:
            found[module] = list(cases())
    return found


def _chosen(config: BlocksVerifyConfig) -> list[tuple[str, int, Case]]:
    known = blocks()
    for name in config.blocks or ():
        if name not in known:
            raise UserError(f"blocks={name}: no such block, choose from {', '.join(known)}")
    names = config.blocks or tuple(known)
    found = [(name, number, case) for name in names for number, case in enumerate(known[name], 1)]
    if config.cases is not None:
        found = [entry for entry in found if entry[1] in config.cases]
    elif config.quick:
        found = [entry for entry in found if entry[1] % QUICK == 1]
    if not found:
        raise UserError(f"cases={config.cases}: no such case of {', '.join(names)}")
    return found


def _run(block: str, number: int, case: Case) -> Verdict:
    name, check = case
    begin = time.monotonic()
    torch.manual_seed(0)
    try:
        errors = check()
    except Skipped as reason:
        return Verdict(block, number, name, {}, time.monotonic() - begin, skipped=str(reason))
    except Exception as error:  # one broken block must not hide what is known of the others
        return Verdict(block, number, name, {}, time.monotonic() - begin, raised=f"{type(error).__name__}: {error}")
    return Verdict(block, number, name, errors, time.monotonic() - begin)


def _rows(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    rows = []
    for block in dict.fromkeys(verdict.block for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.block == block]
        worst = max(own, key=lambda verdict: math.inf if math.isnan(verdict.worst[1]) else verdict.worst[1])
        rows.append(
            {
                "block": block,
                "cases": len(own),
                "failed": sum(verdict.failed for verdict in own),
                "skipped": sum(verdict.skipped is not None for verdict in own),
                "worst": worst.worst[1],
                "of": f"{worst.name}: {worst.worst[0]}",
                "seconds": sum(verdict.seconds for verdict in own),
            }
        )
    return rows


def _print(verdicts: list[Verdict]) -> None:
    lines = [(*(str(v) for v in list(row.values())[:4]), f"{row['worst']:.1e}", row["of"], f"{row['seconds']:.1f}")
             for row in _rows(verdicts)]  # fmt: skip
    table(("block", "cases", "failed", "skipped", "worst error", "of", "s"), lines, align="lrrrrlr")
    for reason in dict.fromkeys(verdict.skipped for verdict in verdicts if verdict.skipped):
        say(f"skipped {sum(verdict.skipped == reason for verdict in verdicts)}: {reason}", style="yellow")
    failures = [verdict for verdict in verdicts if verdict.failed]
    for verdict in failures:
        tensor, error = verdict.worst
        say(f"  {verdict.name}: {verdict.raised or f'{tensor} is off by {error:.1e}'}", style="red")
        say(f"    lctrain verify blocks blocks={verdict.block} cases={verdict.number}")
    if not failures:
        say("every case that ran passed", style="green")


def _store(config: BlocksVerifyConfig, verdicts: list[Verdict]) -> None:
    """Settings, machine and every case as JSON, if the user wants them."""
    settings = config.model_dump(mode="json", exclude={"output"})
    results = [
        verdict._asdict() | {"failed": verdict.failed, "errors": {name: finite(e) for name, e in verdict.errors.items()}}
        for verdict in verdicts
    ]
    content = {"verify": "blocks", "settings": settings, "machine": describe_environment(), "results": results}
    store_report(config.output, content)
