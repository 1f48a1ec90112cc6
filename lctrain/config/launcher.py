"""Settings of whoever starts the processes: this machine, or SLURM."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lctrain.config.strict import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Strict

EARLY_S = 60
"""By how much SLURM may be early with the signal before a time limit."""
NonEmpty = Annotated[str, Field(min_length=1)]


class ContainerConfig(Strict):
    """The container in which a job's processes run; the run directory and the folder of submission are mounted in it."""

    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: options of srun (NVIDIA's plugin with enroot); apptainer: a command in front of Python."""
    image: NonEmpty
    """Image: a name or a file, as the runtime takes it."""
    mounts: tuple[NonEmpty, ...] = ()
    """Further folders to mount, as source or source:target."""
    flags: tuple[NonEmpty, ...] = ()
    """Further options, passed on as they are."""


class SlurmConfig(Strict):
    """What sbatch and srun are told. What is null is left to the cluster's own default."""

    job_name: NonEmpty | None = None
    """Name in the queue; null: the run directory's name."""
    partition: NonEmpty | None = None
    """Partition (queue)."""
    account: NonEmpty | None = None
    """Account to charge."""
    qos: NonEmpty | None = None
    """Quality of service."""
    time: NonEmpty | None = None
    """Time limit of one job, in SLURM's notation: minutes, hours:minutes:seconds or days-hours."""
    gpus_per_node: NonNegative | None = None
    """GPUs per node; null: as many as processes_per_node if engine.device=cuda, else none are asked for."""
    cpus_per_process: Positive | None = None
    """CPU cores per process."""
    mem: NonEmpty | None = None
    """Memory per node, as in 64G; 0 is all of it."""
    constraint: NonEmpty | None = None
    """Features that nodes must have."""
    exclude: NonEmpty | None = None
    """Nodes not to use."""
    sbatch: tuple[NonEmpty, ...] = ()
    """Further options of sbatch, one per entry, written into the script as they are: --mail-type=END."""
    srun: tuple[NonEmpty, ...] = ()
    """Further options of srun, one per entry."""
    setup: tuple[NonEmpty, ...] = ()
    """Shell lines to run first on the first node, such as `module load cuda` or `source venv/bin/activate`."""
    python: NonEmpty | None = None
    """Python of the ranks; null: the one that submits, or python3 in a container."""
    container: ContainerConfig | None = None
    """Run the processes in a container."""
    warn_s: Positive = 120
    """Seconds before the time limit at which the run is told to save and requeue itself; SLURM may do so up to 60 s earlier."""
    restarts: NonNegative = 3
    """How often in a row the job may requeue itself without having got to a new checkpoint."""

    @model_validator(mode="after")
    def _check(self) -> SlurmConfig:
        for name, value in self:
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and (not text.isprintable() or not text.strip()):
                    raise ValueError(f"{name}={text!r} must be one line of printable text")
        for name in ("sbatch", "srun"):
            for option in getattr(self, name):
                if not option.startswith("-"):
                    raise ValueError(f"{name} has {option!r}, which is no option: write --name=value")
        if self.time is not None and self.warn_s + EARLY_S >= limit_s(self.time):
            raise ValueError(
                f"time={self.time} leaves nothing to train in: SLURM may warn up to {EARLY_S} s before warn_s={self.warn_s};"
                " raise the limit, or lower warn_s"
            )
        return self


def limit_s(text: str) -> float:
    """Seconds of a time limit in SLURM's notation; infinite for UNLIMITED. ValueError for any other text."""
    if text.lower() in ("unlimited", "infinite"):
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(\d+)(?::(\d+))?(?::(\d+))?)", text)
    if match is None:
        raise ValueError(f"time={text!r} is no time limit: write minutes, hours:minutes:seconds or days-hours:minutes")
    if match[1] is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in match.group(1, 2, 3, 4))
    elif match[7] is not None:
        days, hours, minutes, seconds = 0, *(int(part) for part in match.group(5, 6, 7))
    else:  # minutes, or minutes:seconds
        days, hours, minutes, seconds = 0, 0, int(match[5]), int(match[6] or 0)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class PreflightConfig(Strict):
    """What every node has to show before the first step."""

    enabled: bool = True
    """Measure the nodes; false: start at once."""
    broken: Literal["stop", "exclude"] = "stop"
    """When a node does not answer, has other versions, a wrong clock, or too little memory or disk: end the job, or requeue it
    without that node."""
    slow: Literal["warn", "stop", "exclude"] = "warn"
    """When a node is slow: say so, end the job, or requeue it without that node."""
    slow_fraction: Fraction = 0.6
    """A node is slow if its matrix products or its network reach less than this fraction of the median node's."""
    min_memory_gb: NonNegativeFloat = 0.5
    """Free memory of a node."""
    min_disk_gb: NonNegativeFloat = 0.5
    """Free space under the run directory, as each node sees it."""
    max_clock_skew_s: PositiveFloat = 2.0
    """Difference of a node's clock to the first node's."""
    timeout_s: Positive = 180
    """Seconds for all nodes to answer."""


class LauncherConfig(Strict):
    """Who starts the processes."""

    kind: Literal["local", "slurm", "slurm_array"] = "local"
    """local: this command starts them on this machine (under torchrun or srun, those processes are used instead). slurm: it
    submits a job. slurm_array: it submits one job per combination of settings with several values, as in optim.lr=1e-3,3e-4."""
    processes: Positive | None = None
    """Processes to start; null: as many as the grid has, dp x cp x tp x pp. With slurm it is nodes x processes_per_node."""
    threads: Positive | None = None
    """CPU threads per process; null: the machine's cores / processes, at least 1."""
    timeout_s: Positive = 600
    """Seconds after which a blocked collective counts as failed."""
    watchdog_s: NonNegative = 540
    """Seconds without progress (no new layer, batch, or phase of the run) after which every process ends itself with status 75,
    and the one that kept the others waiting is named; 0: never. Keep it below timeout_s, past which errors name nobody."""
    grace_s: Positive = 30
    """Seconds the other processes get to end after one has died. (A second stop signal ends them at once.)"""
    nodes: Positive = 1
    """slurm: nodes of a job."""
    processes_per_node: Positive = 1
    """slurm: processes on every node, usually one per GPU."""
    mode: Literal["srun", "torchrun"] = "srun"
    """slurm: srun starts every process, or one torchrun per node, which starts that node's."""
    chain: Positive = 1
    """slurm: jobs that follow each other, each continuing where its time limit ended the one before; for clusters that do not
    allow requeueing."""
    dry_run: bool = False
    """slurm: show the script and submit nothing (also: --dry-run)."""
    slurm: SlurmConfig = SlurmConfig()
    """What sbatch and srun are told."""
    preflight: PreflightConfig = PreflightConfig()
    """Check of the nodes before the first step."""

    @property
    def is_slurm(self) -> bool:
        """Whether the run is submitted instead of started."""
        return self.kind != "local"

    @model_validator(mode="after")
    def _check(self) -> LauncherConfig:
        if self.is_slurm:
            total = self.nodes * self.processes_per_node
            if self.processes not in (None, total):
                raise ValueError(
                    f"processes={self.processes}, but nodes={self.nodes} x processes_per_node={self.processes_per_node} is"
                    f" {total}: leave launcher.processes out"
                )
            # The object is not in use yet; a validator that runs before the fields would have to do without strict JSON mode.
            self.__dict__["processes"] = total
            return self
        for name in ("nodes", "processes_per_node", "chain", "dry_run"):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                shown = str(value).lower()
                raise ValueError(f"{name}={shown} needs launcher=slurm (on this machine, parallel.* says how many processes)")
        return self
