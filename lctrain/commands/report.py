"""Make one HTML page of a run: plots, configuration, verdicts, events, restarts; it needs no network.

usage: lctrain report RUN_DIR [output=PAGE.html]

  lctrain report runs/demo

Works while the run goes on, and writes RUN_DIR/report.html.
"""

from __future__ import annotations

from pathlib import Path

from lctrain.config.load import load
from lctrain.config.report import ReportConfig
from lctrain.config.watch import named_run


def main(args: list[str]) -> int:
    """Run the command."""
    config = load(ReportConfig, "report", named_run(args))

    from lctrain.console import say
    from lctrain.report.page import write_report
    from lctrain.run_dir import RunDir

    path = write_report(RunDir(config.run), Path(config.output) if config.output else None)
    say(f"report: {path}")
    return 0
