"""The report: one line per strategy and number of processes, then every failure with the command that repeats it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lctrain.config.verify import AttentionVerifyConfig
from lctrain.console import counted, say, table
from lctrain.environment import describe_environment
from lctrain.verify.judge import BF16_BAR, FP32_BAR, POOLED, TENSORS, Verdict, pooled_failures, pooled_ratio, worst
from lctrain.verify.output import finite, store_report

SHOWN = 20
"""Failures that are printed; the JSON report has all of them."""

Key = tuple[str, int]


class Report:
    """Verdicts by strategy variant and number of processes."""

    def __init__(self) -> None:
        self._verdicts: dict[Key, list[Verdict]] = defaultdict(list)
        self._seconds: dict[Key, float] = defaultdict(float)

    def add(self, verdicts: Sequence[Verdict], seconds: float) -> None:
        """Take verdicts that came together and share their time equally."""
        for verdict in verdicts:
            key = verdict.case.variant, verdict.case.cp
            self._verdicts[key].append(verdict)
            self._seconds[key] += seconds / len(verdicts)

    @property
    def failures(self) -> list[tuple[str, str]]:
        """What failed: the reason, and the case's command."""
        single = [(what, v.case.command()) for found in self._verdicts.values() for v in found for what in v.failures]
        return single + [
            (what, f"lctrain verify attention strategies={variant} cp={cp} dtypes=bf16")
            for variant, cp in self._verdicts
            for what in pooled_failures(self._ratios((variant, cp)))
        ]

    @property
    def failed(self) -> bool:
        """Whether anything did."""
        return bool(self.failures)

    def rows(self) -> list[dict[str, Any]]:
        """One summary per line of the table: worst fp32 error and pooled bf16 ratio by tensor, cases, failures, seconds."""
        return [
            {
                "strategy": key[0],
                "cp": key[1],
                "cases": len(found),
                "failed": sum(bool(v.failures) for v in found),
                "fp32": {name: self._worst(found, name) for name in TENSORS},
                "bf16": self._ratios(key),
                "seconds": self._seconds[key],
            }
            for key, found in sorted(self._verdicts.items(), key=lambda entry: (entry[0][1], entry[0][0]))
        ]

    def print(self) -> None:
        """The table, then failures."""
        lines = []
        for row in self.rows():
            exact = [_scientific(row["fp32"][name]) for name in TENSORS]
            ratio = [_fixed(row["bf16"][name]) for name in POOLED]
            lines.append((row["strategy"], row["cp"], row["cases"], row["failed"], *exact, *ratio, f"{row['seconds']:.1f}"))
        columns = ("strategy", "cp", "cases", "failed", *TENSORS, *(f"{name} x" for name in POOLED), "s")
        table(columns, lines, align="lrrr" + "r" * (len(TENSORS) + len(POOLED) + 1))
        say(f"out to dsinks: worst relative error in fp32, at most {FP32_BAR:.0e} is allowed")
        say(f"out x to lse x: error in bf16 over that of one process, all cases together, at most {BF16_BAR} is allowed")
        failures = self.failures
        if not failures:
            say("every case passed; bytes sent were those planned in each of them", style="green")
            return
        say("\n" + counted(len(failures), "failure") + (f", the first {SHOWN}:" if len(failures) > SHOWN else ":"), style="red")
        for what, command in failures[:SHOWN]:
            say(f"  {what}\n    {command}")

    def store(self, config: AttentionVerifyConfig) -> None:
        """Settings, machine, table and failures as JSON, if the user wants them."""
        failures = [{"what": what, "command": command} for what, command in self.failures]
        settings = config.model_dump(mode="json", exclude={"output"})
        content = {"verify": "attention", "settings": settings, "machine": describe_environment()}
        results = [row | {"fp32": {name: finite(error) for name, error in row["fp32"].items()}} for row in self.rows()]
        store_report(config.output, {**content, "results": results, "failures": failures})

    def _worst(self, found: Sequence[Verdict], name: str) -> float | None:
        errors = [v.errors[name] for v in found if v.own is None and name in v.errors]
        return worst(errors) if errors else None

    def _ratios(self, key: Key) -> dict[str, float | None]:
        return {name: pooled_ratio(self._verdicts[key], name) for name in POOLED}


def _scientific(number: float | None) -> str:
    return "" if number is None else f"{number:.1e}"


def _fixed(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"
