"""What a run is doing and how far it has come, from its directory and, if it went to SLURM, from the queue."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lctrain.checkpoint.folders import checkpoints
from lctrain.config.render import from_yaml
from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError
from lctrain.launch.slurm import Submission, submissions
from lctrain.launch.slurm_queue import UNREACHABLE, JobState, job_state
from lctrain.run_dir import RunDir, lock_holder
from lctrain.tracking.jsonl import read_events, read_metrics

RECENT = 50
"""Steps from whose times the time left is estimated."""
CAUSES = ("failure", "requeue", "next_job", "cancelled", "give_up", "finished", "stopped", "stop")
"""Events that tell why a start of a run ended."""


@dataclass(frozen=True)
class RunState:
    """A run at this moment. jobs: those of the last submission, empty for a run on this machine; holder: who trains now."""

    run: RunDir
    config: TrainConfig | None
    holder: str | None
    submission: Submission | None
    jobs: tuple[JobState, ...]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def current_job(self) -> JobState | None:
        """The job that runs or comes next; the last one when all have ended."""
        return next((job for job in self.jobs if not job.ended), self.jobs[-1] if self.jobs else None)

    @property
    def running(self) -> bool:
        job = self.current_job
        return job.state == "RUNNING" if job is not None else self.holder is not None


def run_state(path: str) -> RunState:
    """Read a run directory and ask the queue; UserError if it is none."""
    run = RunDir(path)
    sent = submissions(run)
    if not run.path.is_dir() or not (sent or run.events.exists() or run.config.exists()):
        raise UserError(f"run={path} is no run directory of lctrain train")
    submission = sent[-1] if sent else None
    return RunState(
        run=run,
        config=_config(run, submission),
        holder=lock_holder(run),
        submission=submission,
        jobs=tuple(job_state(job) for job in submission.jobs) if submission else (),
        metrics=read_metrics(run.metrics),
        events=read_events(run.events),
    )


def runs_below(path: str) -> list[str]:
    """The run directories that a path stands for: itself, or the runs of the sweep whose folder it is."""
    folder = Path(path)
    lists = sorted(folder.glob("slurm/*/runs"))
    return lists[-1].read_text().splitlines() if lists else [path]


def describe(state: RunState) -> list[tuple[str, str]]:
    """(what, text) for `lctrain status`."""
    lines = [("run", _run_text(state)), ("state", _state_text(state)), ("progress", _progress_text(state))]
    found = checkpoints(state.run.checkpoints)
    if found:
        step, path = found[-1]
        lines.append(("checkpoint", f"step {step}, {_age(path.stat().st_mtime)} ago"))
    else:
        lines.append(("checkpoint", "none yet"))
    starts = sum(event["kind"] == "launch" for event in state.events)
    ends = [event for event in state.events if event["kind"] in CAUSES]
    lines.append(("starts", str(starts)))
    for event in ends[-3:]:
        text = event.get("reason") or event.get("message") or (f"after step {event['step']}" if "step" in event else "")
        when = datetime.fromisoformat(event["time"]).timestamp()
        lines.append((event["kind"].replace("_", " "), f"{_age(when)} ago: {text}"))
    return lines


def _run_text(state: RunState) -> str:
    if state.config is None:
        return str(state.run.path)
    count = state.config.processes
    return f"{state.run.path}: {state.config.model.name}, {count} process{'es' if count > 1 else ''}"


def _state_text(state: RunState) -> str:
    if not state.jobs:
        return f"running, pid {state.holder}" if state.holder else "not running"
    job = state.current_job
    assert job is not None
    later = [other.job for other in state.jobs[state.jobs.index(job) + 1 :]]
    text = f"job {job.job} {job.state}"
    if job.state == "RUNNING":
        text += f" on {job.nodes} for {job.run_time} of {job.time_limit}"
    elif job.waits and job.reason:
        text += f" ({job.reason}{f', expected at {job.start}' if job.start else ''})"
    elif job.state == "UNKNOWN":
        text += ": the queue has forgotten it, so it has ended"
    elif job.state == UNREACHABLE:
        text = f"job {job.job}: SLURM does not answer ({job.reason})"
    if job.restarts:
        text += f", requeued {job.restarts} time{'s' if job.restarts > 1 else ''}"
    return text + (f"; then {', '.join(later)}" if later else "")


def _progress_text(state: RunState) -> str:
    if not state.metrics:
        return "no step yet"
    last = state.metrics[-1]
    steps = state.config.trainer.steps if state.config else None
    text = f"step {last['step']}" + (f" of {steps} ({last['step'] / steps:.0%})" if steps else "")
    if last.get("loss") is not None:
        text += f", loss {last['loss']:.4f}"
    if last.get("tokens_per_s"):
        text += f", {last['tokens_per_s']:,.0f} tok/s"
    times = [record["step_s"] for record in state.metrics[-RECENT:] if record.get("step_s")]
    if steps and times and state.running and last["step"] < steps:
        text += f", about {_duration((steps - last['step']) * statistics.median(times))} left"
    return text


def _config(run: RunDir, submission: Submission | None) -> TrainConfig | None:
    """What the run runs, or will run once its latest job starts; None if its settings belong to another version of lctrain."""
    kept = run.config
    if submission is not None:
        _, array, task = submission.jobs[0].partition("_")
        kept = Path(submission.folder) / (f"config-{task}.yaml" if array else "config.yaml")
    there = [path for path in (run.config, kept) if path.exists()]
    if not there:
        return None
    try:
        return from_yaml(TrainConfig, max(there, key=lambda path: path.stat().st_mtime).read_text())
    except UserError:
        return None


def _age(then: float) -> str:
    return _duration(max(0.0, time.time() - then))


def _duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for size, unit in ((1, "s"), (60, "min")):
        if seconds < 90 * size or (unit == "min" and seconds < 7200):
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
