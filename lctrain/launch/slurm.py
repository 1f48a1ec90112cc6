"""Submit a run, or the runs of a sweep, to SLURM: keep what the job needs in the run directory, and hand it to sbatch."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from lctrain.checkpoint.folders import checkpoints
from lctrain.checkpoint.manifest import read_manifest
from lctrain.config.render import from_yaml, to_yaml
from lctrain.config.schema import TrainConfig
from lctrain.config.sweep import SweepRun
from lctrain.errors import UserError
from lctrain.launch.slurm_queue import job_state, require, submit_script
from lctrain.launch.slurm_script import Job, describe, render_script
from lctrain.launch.slurm_snapshot import copy_code
from lctrain.run_dir import RunDir, command_line
from lctrain.tracking.jsonl import append_event, read_lines
from lctrain.whole_file import write_text


class Submission(NamedTuple):
    """What <run_dir>/slurm/jobs.jsonl tells of one submission: its jobs in the order in which they run, and their logs."""

    jobs: tuple[str, ...]
    folder: str

    def log(self, run: RunDir, job: str) -> Path:
        """Where a job writes; that of a sweep lies in the sweep's folder."""
        base = run.path.parent if "_" in job else run.path
        return RunDir(base).log / f"slurm-{job}.out"


def submit(runs: list[SweepRun]) -> int:
    """Submit the run, or all runs of a sweep as one array; with launcher.dry_run only print the script. Returns 0.

    UserError, before anything is written, for what can be known to go wrong: no sbatch, a corpus that does not exist and has
    no source, wandb that is missing, a run directory that belongs to another run, a job of the same run that is still in the
    queue.
    """
    config = runs[0].config
    sweep = bool(runs[0].label)
    top = Path(config.run_dir).absolute()
    top = top.parent if sweep else top
    folders = tuple(Path(run.config.run_dir).absolute() for run in runs)
    for run in runs:
        _check(run.config)
        _refuse_other_run(run.config)
    number = next(n for n in itertools.count(1) if not (top / "slurm" / f"{n:03}").exists())
    job = Job(
        kept=top / "slurm" / f"{number:03}",
        run=top,
        log=RunDir(top).log,
        folder=Path.cwd(),
        command=command_line(),
        runs=folders if sweep else (),
    )
    script = render_script(config, job)
    if config.launcher.dry_run:
        print(script, end="")
        return 0
    require("sbatch")
    for folder in folders:
        _refuse_second(RunDir(folder))
    try:
        _keep(job, script, runs)
    except OSError as error:
        raise UserError(f"run_dir={top} cannot be written: {error.strerror}; choose another run_dir") from None
    jobs: list[str] = []
    for _ in range(config.launcher.chain):
        jobs.append(submit_script(str(job.kept / "job.sbatch"), after=jobs[-1] if jobs else None))
    for number, folder in enumerate(folders):
        _note(RunDir(folder), [f"{one}_{number}" for one in jobs] if sweep else jobs, job.kept)
    _tell(config, job, jobs, folders)
    return 0


def submissions(run: RunDir) -> list[Submission]:
    """All submissions of a run, oldest first; empty if it never went to SLURM."""
    return [Submission(tuple(line["jobs"]), line["folder"]) for line in read_lines(run.slurm / "jobs.jsonl")]


def _check(config: TrainConfig) -> None:
    from lctrain.data.indexed import corpus_exists
    from lctrain.tracking.wandb import check_wandb

    if config.launcher.slurm.python is None and config.launcher.slurm.container is None:
        check_wandb(config)
    for corpus in config.data.corpora:
        if corpus.source is None and not corpus_exists(corpus.prefix):
            raise UserError(
                f"corpus {corpus.prefix} does not exist: run lctrain data prepare input=<files> output={corpus.prefix}"
                f" tokenizer={config.data.tokenizer}"
            )


def _refuse_other_run(config: TrainConfig) -> None:
    """UserError for what the ranks would find once the job has waited for its nodes: these checkpoints are another run's.

    Only what can be seen without torch: data, and the sizes that every model has.
    """
    from lctrain.data.identity import check_data
    from lctrain.models.pattern import parse_pattern

    run = RunDir(config.run_dir)
    found = checkpoints(run.checkpoints)
    if config.resume != "auto" or not found:
        return
    path = found[-1][1]
    try:
        before, stored = from_yaml(TrainConfig, run.config.read_text()), read_manifest(path)["meta"]["data"]
    except (OSError, UserError, ValueError, KeyError):
        return  # settings of another version, or a damaged checkpoint, in whose place the ranks take an earlier one
    old, new = before.model, config.model
    sizes = {name: (getattr(old, name), getattr(new, name)) for name in ("d_model", "vocab_size")}
    if parse_pattern(old.pattern) != parse_pattern(new.pattern):
        sizes["pattern"] = old.pattern, new.pattern
    for name, (was, now) in sizes.items():
        if was != now:
            raise UserError(
                f"run_dir={run.path} has checkpoints of a model with {name}={was}, the settings say model.{name}={now}:"
                " choose another run_dir"
            )
    check_data(config, stored, path)


def _refuse_second(run: RunDir) -> None:
    """A run directory has one writer; a second job would only wait for nodes to find that out."""
    for job in (job for submission in submissions(run) for job in submission.jobs):
        state = job_state(job)
        if not state.ended:
            raise UserError(
                f"run_dir={run.path} has job {job} in the queue ({state.state}): end it with lctrain stop {run.path},"
                " or choose another run_dir"
            )


def _keep(job: Job, script: str, runs: list[SweepRun]) -> None:
    job.kept.mkdir(parents=True)
    job.log.mkdir(exist_ok=True)
    copy_code(job.kept / "code")
    for number, run in enumerate(runs):
        name = f"config-{number}.yaml" if job.runs else "config.yaml"
        write_text(job.kept / name, to_yaml(run.config))
    if job.runs:
        write_text(job.kept / "runs", "".join(f"{folder}\n" for folder in job.runs))
    write_text(job.kept / "job.sbatch", script)
    (job.kept / "job.sbatch").chmod(0o755)


def _note(run: RunDir, jobs: list[str], kept: Path) -> None:
    run.slurm.mkdir(parents=True, exist_ok=True)
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "jobs": jobs, "folder": str(kept)}
    with open(run.slurm / "jobs.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    append_event(run.events, "submit", jobs=jobs, command=sys.orig_argv, host=os.uname().nodename)


def _tell(config: TrainConfig, job: Job, jobs: list[str], folders: tuple[Path, ...]) -> None:
    launcher = config.launcher
    what = f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {', '.join(jobs)}, one after the other"
    if job.runs:
        what += f", an array of {len(folders)} runs in {job.run}"
    print(f"submitted {what}: {describe(launcher)}, time limit {launcher.slurm.time or 'of the partition'}")
    run, first = (shlex.quote(os.path.relpath(path)) for path in (job.run, folders[0]))
    print(f"  script    {os.path.relpath(job.kept)}/job.sbatch")
    print(f"  follow    lctrain logs {first} follow=true")
    print(f"  state     lctrain status {run}")
    print(f"  end       lctrain stop {run}")
