"""What a report says in words and numbers: state of the run, key figures, events, environment, verdicts."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lctrain.report.ticks import number
from lctrain.run_dir import RunDir
from lctrain.tracking.console_line import format_duration


def read_config(run: RunDir) -> dict[str, Any]:
    """config.yaml as plain values; empty if there is none (yet)."""
    try:
        found = yaml.safe_load(run.config.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is none, or a torn one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def state(
    records: list[dict[str, Any]], events: list[dict[str, Any]], config: dict[str, Any], running: bool
) -> tuple[str, str]:
    """(in a word or two, class of its colour)."""
    done, total = records[-1]["step"] if records else 0, config.get("trainer", {}).get("steps")
    if total and done >= total:  # also while the run draws this very page
        return f"finished, {done} steps", "good"
    if running:
        return f"running, step {done} of {total}", ""
    last: dict[str, Any] = next((event for event in reversed(events) if event.get("kind") in ("stop", "launch", "failure")), {})
    how = {"stop": f"stopped by {last.get('signal')}", "failure": "failed"}.get(str(last.get("kind")), "unfinished")
    return f"{how}, step {done} of {total or '?'}", "bad"


def tiles(records: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(what, value) of the key figures."""
    last = records[-1]
    found = [("steps", f"{last['step']:,}")]
    if last.get("loss") is not None:
        found.append(("last loss", f"{last['loss']:.4f}"))
    held_out = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    if held_out:
        found.append(("best held-out loss", f"{min(held_out):.4f}"))
    tokens = sum(record.get("tokens") or 0 for record in records)
    if tokens:
        found.append(("tokens", number(tokens)))
    for key, what, text in (
        ("tokens_per_s", "median tokens/s", "{:,.0f}"),
        ("mfu", "median MFU", "{:.1%}"),
        ("step_s", "median step", "{:.3g} s"),
    ):
        values = sorted(record[key] for record in records if record.get(key) is not None)
        if values:
            found.append((what, text.format(values[len(values) // 2])))
    peak = max((record.get("memory_mb") or 0 for record in records), default=0)
    if peak:
        found.append(("peak memory", f"{number(peak, 3)} MiB"))
    if seconds := _wall_s(events):
        found.append(("from start to last event", format_duration(seconds)))
    found.append(("restarts", str(sum(event.get("kind") == "resume" for event in events))))
    if skipped := sum(bool(record.get("skipped")) for record in records):
        found.append(("skipped steps", str(skipped)))
    return found


def model_line(config: dict[str, Any]) -> str:
    """What was trained, and how it was laid out, in a line; empty without a config."""
    if not config:
        return ""
    model, trainer, parallel = (config.get(key) or {} for key in ("model", "trainer", "parallel"))
    sizes = ", ".join(f"{name} {parallel[name]}" for name in ("dp", "cp", "tp", "pp", "ep") if (parallel.get(name) or 1) > 1)
    processes = (config.get("launcher") or {}).get("processes")
    engine = config.get("engine") or {}
    return (
        f"{model.get('name', 'model')}, pattern {model.get('pattern')}, {trainer.get('global_batch')} sequences of"
        f" {trainer.get('seq_len'):,} tokens a step on {processes} processes{f' ({sizes})' if sizes else ''},"
        f" engine {engine.get('name')}, {engine.get('dtype')}"
    )


def event_rows(events: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(time, kind, rest in words)."""
    rows = []
    for event in events:
        rest = {key: value for key, value in event.items() if key not in ("time", "kind") and value is not None}
        time = str(event.get("time", "")).replace("T", " ")[:19]
        rows.append((time, str(event.get("kind", "?")), ", ".join(f"{key} {_plain(value)}" for key, value in rest.items())))
    return rows


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _wall_s(events: list[dict[str, Any]]) -> float:
    times = []
    for event in events:
        try:
            times.append(datetime.fromisoformat(event["time"]))
        except (KeyError, TypeError, ValueError):
            continue
    return (max(times) - min(times)).total_seconds() if times else 0.0
