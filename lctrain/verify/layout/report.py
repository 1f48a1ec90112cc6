"""The report on layouts: every check of one, or one line for each of many."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from lctrain.config.schema import TrainConfig
from lctrain.config.verify import LayoutVerifyConfig
from lctrain.console import say, table
from lctrain.environment import describe_environment
from lctrain.errors import UserError
from lctrain.verify.layout.judge import Check
from lctrain.whole_file import check_output, write_json


@dataclasses.dataclass(frozen=True)
class LayoutReport:
    """Verdict on one layout.

    config: what was run, after shrinking; notes: what of the layout had to be made smaller. problem: trace of a rank that
    raised or hung, instead of checks.
    """

    name: str
    config: TrainConfig
    notes: list[str]
    checks: list[Check]
    problem: str | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return self.problem is None and all(check.passed for check in self.checks)


def print_one(report: LayoutReport) -> None:
    """Every check of a layout."""
    model, trainer = report.config.model, report.config.trainer
    say(
        f"{report.name}: pattern {model.pattern}, width {model.d_model}, {trainer.global_batch} samples of {trainer.seq_len}"
        f" tokens, {trainer.steps} steps, fp32, against one process"
    )
    for note in report.notes:
        say(f"  made smaller for this machine: {note}")
    if report.problem is not None:
        say(report.problem)
    lines = [
        (
            check.name,
            f"{check.value:.1e}",
            f"{check.limit:.0e}" if check.limit else "0",
            "pass" if check.passed else "FAIL",
            check.where,
        )
        for check in report.checks
    ]
    table(("check", "deviation", "limit", "", "largest at"), lines, align="lrrl")
    if report.passed:
        say(f"proved in {report.seconds:.0f} s: this layout computes what one process computes", style="green")
    else:
        say("NOT equal to one process", style="red")


def print_matrix(reports: list[LayoutReport]) -> None:
    """One line per layout, with the worst of each kind of check; then what failed."""
    lines = [
        (
            report.name,
            report.config.processes,
            *(
                _worst(report, prefix)
                for prefix in ("loss", "grad norm", "gradients", "weights", "optimizer", "leak", "resumed")
            ),
            f"{report.seconds:.1f}",
            "pass" if report.passed else "FAIL",
        )
        for report in reports
    ]
    columns = ("layout", "ranks", "loss", "grad norm", "gradients", "weights", "moments", "leak", "resumed", "s", "")
    table(columns, lines, align="lrrrrrrrrrl")
    failed = [report for report in reports if not report.passed]
    for report in failed:
        say(f"\nFAIL {report.name}", style="red")
        if report.problem is not None:
            say(report.problem)
        for check in report.checks:
            if not check.passed:
                say(f"  {check.name}: {check.value:.1e}, limit {check.limit:.0e} {check.where}")
    if failed:
        say(f"\n{len(failed)} of {len(reports)} layouts are NOT equal to one process", style="red")
    else:
        say(f"all {len(reports)} layouts compute what one process computes", style="green")


def check_place(options: LayoutVerifyConfig, run: Path | None) -> None:
    """UserError now rather than after the proof, if its report could not be written; makes the run directory if need be."""
    check_output("verify.output", options.output)
    if options.output is None and run is not None:
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run_dir={run} cannot be used: {error.strerror}; choose another run_dir") from None


def store(reports: list[LayoutReport], options: LayoutVerifyConfig, run: Path | None) -> None:
    """The report as JSON: where the user wants it, else in the run directory."""
    path = Path(options.output) if options.output is not None else run and run / "verify_layout.json"
    if path is None:
        return
    results = [
        {
            "layout": report.name,
            "passed": report.passed,
            "config": report.config.model_dump(mode="json", include={"model", "parallel", "engine", "trainer", "launcher"}),
            "notes": report.notes,
            "problem": report.problem,
            "seconds": round(report.seconds, 1),
            "checks": [
                check._asdict()
                | {"value": check.value if math.isfinite(check.value) else str(check.value), "passed": check.passed}
                for check in report.checks
            ],
        }
        for report in reports
    ]
    settings = options.model_dump(mode="json")
    write_json(path, {"verify": "layout", "settings": settings, "machine": describe_environment(), "results": results})
    say(f"report in {path}")


def _worst(report: LayoutReport, prefix: str) -> str:
    values = [check.value for check in report.checks if check.name.startswith(prefix)]
    return f"{max(values):.0e}" if values else ""
