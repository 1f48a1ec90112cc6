"""What a run directory says of the run's past."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lctrain.checkpoint.folders import checkpoints
from lctrain.checkpoint.manifest import read_manifest
from lctrain.config.render import from_yaml
from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError
from lctrain.faults.passed_over import PassedOver, merged, read_passed_over
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import append_event, read_events, read_lines

DISCARDED = "discarded"
"""Kind of the event that keeps the digests of steps whose work was lost: metrics.jsonl drops their lines."""


@dataclasses.dataclass(frozen=True)
class History:
    """records: the lines of metrics.jsonl as they stand there. metas: of every whole checkpoint, by finished steps."""

    run: RunDir
    config: TrainConfig
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]
    passed_over: list[PassedOver]
    metas: dict[int, dict[str, Any]]


def read_history(path: str | Path) -> History:
    """UserError if `path` is no run directory, or one of another version of lctrain."""
    run = RunDir(path)
    if not run.config.exists():
        raise UserError(f"run={path} has no config.yaml: name the folder of a run that has begun")
    config = from_yaml(TrainConfig, run.config.read_text())
    metas = {}
    for step, folder in checkpoints(run.checkpoints):
        try:
            metas[step] = read_manifest(folder)["meta"]
        except ValueError:  # `resume` passes it over too, and says so
            continue
    listed = (PassedOver.of_json(entry) for meta in metas.values() for entry in meta.get("passed_over", []))
    passed_over = merged(read_passed_over(run.passed_over), listed)
    return History(run, config, list(read_lines(run.metrics)), read_events(run.events), passed_over, metas)


def note_discarded(run: RunDir, start: int) -> None:
    """Keep the digests of recorded steps after `start`, which are about to be computed again, in an event; for rank 0."""
    steps = [[record["step"], record["digest"]] for record in read_lines(run.metrics) if _after(record, start)]
    if steps:
        try:
            append_event(run.events, DISCARDED, after=start, steps=steps)
        except OSError as error:
            raise UserError(
                f"{run.events} cannot be written: {error.strerror}; free some space, then give the same command again"
            ) from None


def _after(record: dict[str, Any], start: int) -> bool:
    return record.get("step", 0) > start and "digest" in record
