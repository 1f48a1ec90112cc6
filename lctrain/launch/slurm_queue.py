"""Questions and orders to SLURM, through its own commands."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from lctrain.errors import UserError

PATIENCE_S = 60
STOPPED = ("CANCELLED", "DEADLINE", "PREEMPTED", "REVOKED", "TIMEOUT")
UNREACHABLE = "UNREACHABLE"
BROKEN = ("BOOT_FAIL", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class JobState:
    """A job as the controller knows it; `state` is UNKNOWN for one that it has forgotten, UNREACHABLE if it does not answer."""

    job: str
    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0
    run_time: str = ""
    time_limit: str = ""
    start: str = ""

    @property
    def waits(self) -> bool:
        """In the queue, not on nodes."""
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "COMPLETING")

    @property
    def ended(self) -> bool:
        """It will not run again."""
        return self.state in ("COMPLETED", "UNKNOWN", *STOPPED, *BROKEN)


def require(command: str) -> None:
    """UserError where this machine has no SLURM commands."""
    if shutil.which(command) is None:
        raise UserError(
            f"launcher=slurm needs {command}, which this machine does not have: give the command on a login node of the"
            " cluster, or look at the script with --dry-run"
        )


def submit_script(script: str, after: str | None = None) -> str:
    """Give a script to sbatch and return the job's number; UserError with sbatch's own words if it refuses.

    after: a job that must have ended, however it ended, before this one starts.
    """
    require("sbatch")
    dependency = [f"--dependency=afterany:{after}"] if after else []
    done = _run("sbatch", "--parsable", *dependency, script)
    if done.returncode:
        raise UserError(f"sbatch refuses the job: {_complaint(done.stderr)}; the script is {script}")
    return done.stdout.strip().partition(";")[0]


def job_state(job: str) -> JobState:
    """State of a job or of a task of an array (`12_3`)."""
    require("scontrol")
    done = _run("scontrol", "-o", "show", "job", job)
    if done.returncode and re.search(r"contact|connect|timed out", done.stderr, re.I):
        return JobState(job, UNREACHABLE, _complaint(done.stderr))
    if done.returncode or not done.stdout.strip():
        return JobState(job, _accounted_state(job))
    return parse_job(job, done.stdout.splitlines()[0])


def parse_job(job: str, text: str) -> JobState:
    """A line of `scontrol -o show job`. JobName may hold spaces and anything else: what comes first counts, except it."""
    text = re.sub(r" JobName=.*? (?=UserId=)", " ", text)
    fields: dict[str, str] = {}
    for name, value in re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", text):
        fields.setdefault(name, value)

    def field(name: str) -> str:
        value = fields.get(name, "")
        return "" if value in ("None", "(null)", "Unknown", "N/A") else value

    restarts = field("Restarts")
    return JobState(
        job=job,
        state=field("JobState") or "UNKNOWN",
        reason=field("Reason"),
        nodes=field("NodeList"),
        restarts=int(restarts) if restarts.isdigit() else 0,
        run_time=field("RunTime"),
        time_limit=field("TimeLimit"),
        start=field("StartTime"),
    )


def signal_batch(job: str, name: str) -> None:
    """Send a signal to the batch script of a job alone, which decides what its processes get."""
    _order("scancel", "--batch", f"--signal={name}", job)


def cancel(jobs: list[str]) -> None:
    """Take jobs out of the queue; running ones get SIGTERM, and SIGKILL after the cluster's KillWait."""
    if jobs:
        _order("scancel", *jobs)


def _order(*command: str) -> None:
    require(command[0])
    done = _run(*command)
    if done.returncode:
        raise UserError(f"{command[0]} {command[-1]} failed: {_first_line(done.stderr)}")


def _accounted_state(job: str) -> str:
    """What the accounting remembers of a job that the controller has forgotten."""
    if shutil.which("sacct"):
        done = _run("sacct", "-X", "-n", "-P", "-o", "State", "-j", job)
        words = done.stdout.split()
        if not done.returncode and words:
            return words[0]
    return "UNKNOWN"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {PATIENCE_S} s: is SLURM's controller up?") from None


def _complaint(text: str) -> str:
    """What is behind `sbatch: error: Batch job submission failed: ` and `slurm_load_jobs error: `."""
    return re.sub(r"^((sbatch|scontrol): |(slurm_\w+ )?error: |Batch job submission failed: )*", "", _first_line(text))


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[0]
