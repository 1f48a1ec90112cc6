"""The report: one HTML file with everything inside it."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from lctrain.errors import UserError
from lctrain.report.charts import Group, make_groups
from lctrain.report.facts import event_rows, model_line, read_config, read_json, state, tiles
from lctrain.report.planned import planned_otherwise, planned_rows
from lctrain.report.svg import Chart
from lctrain.run_dir import RunDir, lock_holder
from lctrain.tracking.jsonl import read_events, read_metrics
from lctrain.tracking.series import restarts
from lctrain.whole_file import write_text

ALARMS = ("failure", "not_finite", "replicas_differ", "rollback", "FAIL")
"""Events and verdicts that must not be overlooked."""
_HERE = Path(__file__).parent
MOST_EVENTS = 200
"""Events shown; of more, the newest."""


def write_report(run: RunDir, output: Path | None = None) -> Path:
    """Write the page of a run, finished or not, and return its path; UserError if there is no run or it cannot be written."""
    if not run.path.is_dir():
        raise UserError(f"run={run.path} is no folder: give the run_dir of a run")
    if not any(path.exists() for path in (run.config, run.events, run.metrics)):
        raise UserError(f"run={run.path} is no run directory: it has neither config.yaml, events.jsonl nor metrics.jsonl")
    path = output or run.report
    try:
        write_text(path, render(run))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; give another path with output=") from None
    return path


def render(run: RunDir) -> str:
    """The page's text."""
    records = [record for record in read_metrics(run.metrics) if "step" in record]
    events, config = read_events(run.events), read_config(run)
    name = run.path.resolve().name
    what, colour = state(records, events, config, lock_holder(run) is not None)
    body = [
        f'<h1>{_text(name)}<span class="status {colour}">{_text(what)}</span></h1>',
        f'<p class="soft">{_text(model_line(config))}</p>',
    ]
    if records:
        body.append(f'<div class="tiles">{"".join(_tile(*each) for each in tiles(records, events))}</div>')
        body += [_group(group) for group in make_groups(records, events, restarts(run, records))]
    else:
        body.append('<div class="card"><b>No step has been finished yet</b>, so there is nothing to plot.</div>')
    body += [_planned(run, config, records), _verify(run), _events(events), _config(run), _environment(run)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(name)}</title>'
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    # A page that may load nothing: what stands in a run's files cannot make it do so.
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<style>\n{style}</style></head>\n<body>\n" + "\n".join(body) + f"\n<script>\n{script}</script>\n</body></html>\n"
    )


def _tile(what: str, value: str) -> str:
    return f'<div class="tile"><b>{_text(value)}</b><span>{_text(what)}</span></div>'


def _group(group: Group) -> str:
    return f'<h2>{_text(group.title)}</h2>\n<div class="plots">\n' + "\n".join(map(_figure, group.charts)) + "\n</div>"


def _figure(chart: Chart) -> str:
    legend = "".join(f'<span><i class="{colour}"></i>{_text(label)}</span>' for colour, label in chart.legend())
    return (
        f'<figure><h3>{_text(chart.title)}</h3><p class="note">{_text(chart.note)}</p>'
        f'<div class="legend">{legend}</div>{chart.svg()}</figure>'
    )


def _planned(run: RunDir, config: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    plan = read_json(run.path / "plan.json")
    rows, otherwise = planned_rows(plan, records), planned_otherwise(plan, config)
    if not rows:
        return ""
    note = f'<p class="bad">The plan is one for other settings: {_text(otherwise)}</p>' if otherwise else ""
    table = _table(("", "planned", "in this run", "ratio"), rows)
    return f'<h2>Planned and measured</h2><div class="card">{note}{table}</div>'


def _verify(run: RunDir) -> str:
    report = read_json(run.path / "verify_layout.json")
    if not isinstance(report, dict):
        return ""
    parts = []
    for result in report.get("results", []):
        verdict = '<b class="good">pass</b>' if result.get("passed") else '<b class="bad">FAIL</b>'
        rows = [
            (
                check.get("name"),
                _short(check.get("value")),
                _short(check.get("limit")),
                "pass" if check.get("passed") else "FAIL",
            )
            for check in result.get("checks", [])
        ]
        parts.append(
            f"<p>{verdict} {_text(result.get('layout'))}, {_text(result.get('seconds'))} s"
            f" {_text('; '.join(result.get('notes') or []))}</p>"
            + (f"<pre>{_text(result['problem'])}</pre>" if result.get("problem") else "")
            + _details("checks against one process", _table(("check", "deviation", "limit", ""), rows, ALARMS))
        )
    return f'<h2>Verified layout</h2><div class="card">{"".join(parts)}</div>'


def _events(events: list[dict[str, Any]]) -> str:
    if not events:
        return ""
    left_out = len(events) - MOST_EVENTS
    note = f'<p class="soft">The newest {MOST_EVENTS} of {len(events)}</p>' if left_out > 0 else ""
    rows = event_rows(events[-MOST_EVENTS:])
    return f'<h2>Events</h2><div class="card">{note}{_table(("time (UTC)", "event", ""), rows, ALARMS)}</div>'


def _config(run: RunDir) -> str:
    if not run.config.exists():
        return ""
    parts = [_details("config.yaml", f"<pre>{_text(run.config.read_text(errors='replace'))}</pre>")]
    for path in sorted(run.path.glob("config.[0-9]*.yaml")):
        parts.append(_details(f"{path.name}, of an earlier start", f"<pre>{_text(path.read_text(errors='replace'))}</pre>"))
    return f'<h2>Configuration</h2><div class="card">{"".join(parts)}</div>'


def _environment(run: RunDir) -> str:
    environment = read_json(run.environment)
    if not isinstance(environment, dict):
        return ""
    rows = []
    for key, value in environment.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        rows.append((key, value))
    diff = run.diff.read_text(errors="replace") if run.diff.exists() else ""
    changes = _details("uncommitted changes of lctrain", f"<pre>{_text(diff)}</pre>") if diff else ""
    return f'<h2>Environment of the last start</h2><div class="card">{_table((), rows)}{changes}</div>'


def _details(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], alarms: Collection[str] = ()) -> str:
    """alarms: cells of these texts are written in the colour of what is bad."""

    def cell(value: Any) -> str:
        return f'<td class="bad">{_text(value)}</td>' if value in alarms else f"<td>{_text(value)}</td>"

    top = f"<tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr>" if head else ""
    return f"<table>{top}{''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)}</table>"


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else str(value)


def _text(value: Any) -> str:
    return html.escape("" if value is None else str(value))
