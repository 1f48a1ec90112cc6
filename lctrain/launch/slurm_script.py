"""The batch script of a run: slurm/job.sbatch, filled in."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lctrain
from lctrain.config.launcher import ContainerConfig, LauncherConfig, SlurmConfig
from lctrain.config.schema import TrainConfig

TEMPLATE = Path(lctrain.__file__).parent / "slurm" / "job.sbatch"


@dataclass(frozen=True)
class Job:
    """What a script needs besides the settings; all paths are absolute.

    kept: folder of the submission. run: run directory, or that of the whole sweep. log: its folder for the jobs' output.
    folder: where the user gave the command, to which relative paths in the settings refer. command: that command.
    runs: run directories of a job array, one per task; empty for a plain job.
    """

    kept: Path
    run: Path
    log: Path
    folder: Path
    command: str
    runs: tuple[Path, ...] = ()


def render_script(config: TrainConfig, job: Job) -> str:
    """The text of job.sbatch; of a sweep's settings only the launcher's are used, which all of its runs share."""
    launcher, slurm = config.launcher, config.launcher.slurm
    each = launcher.processes_per_node
    per_task = 1 if launcher.mode == "srun" else each
    tasks = [f"--ntasks={config.processes // per_task}", f"--ntasks-per-node={each // per_task}"]
    if slurm.cpus_per_process:  # srun does not take it over from sbatch
        tasks.append(f"--cpus-per-task={slurm.cpus_per_process * per_task}")
    kept = shlex.quote(str(job.kept))
    which = (
        [f"run={shlex.quote(str(job.run))}", "config=$kept/config.yaml"]
        if not job.runs
        else ['run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$kept/runs")', "config=$kept/config-$SLURM_ARRAY_TASK_ID.yaml"]
    )
    python, options = _in_container(slurm, job)
    values = {
        "command": _one_line(job.command),
        "directives": "\n".join(f"#SBATCH {option}" for option in _directives(config, job)),
        "kept": kept,
        "which": "\n".join(which),
        "restarts": str(slurm.restarts),
        "chain": str(launcher.chain),
        "folder": shlex.quote(str(job.folder)),
        "setup": "\n".join(slurm.setup),
        "python": shlex.join(python),
        "srun": shlex.join(["srun", f"--nodes={launcher.nodes}", *options, *slurm.srun]),
        "tasks": " ".join(tasks),
        "entry": "rank" if launcher.mode == "srun" else "node",
        "exclude": shlex.quote(slurm.exclude or ""),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def sbatch_value(text: str) -> str:
    """A value as the parser of #SBATCH lines reads it: quotes work as in a shell, a backslash escapes everywhere."""
    if re.fullmatch(r"[\w./:,=@%+\[\]-]+", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _directives(config: TrainConfig, job: Job) -> list[str]:
    launcher, slurm = config.launcher, config.launcher.slurm
    tasks = launcher.processes_per_node if launcher.mode == "srun" else 1
    gpus = slurm.gpus_per_node
    if gpus is None and config.engine.device == "cuda":
        gpus = launcher.processes_per_node
    name = "slurm-%A_%a.out" if job.runs else "slurm-%j.out"
    cpus = slurm.cpus_per_process
    options: list[tuple[str, object]] = [
        ("job-name", slurm.job_name or job.run.name),
        ("nodes", launcher.nodes),
        ("ntasks-per-node", tasks),
        ("cpus-per-task", cpus * launcher.processes_per_node // tasks if cpus else None),
        # Not --gpus-per-task: every rank would see one GPU as number 0, and choose the one of its local number.
        ("gpus-per-node", gpus or None),
        ("mem", slurm.mem),
        ("time", slurm.time),
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("exclude", slurm.exclude),
        ("array", f"0-{len(job.runs) - 1}" if job.runs else None),
        ("output", f"{str(job.log).replace('%', '%%')}/{name}"),
        ("open-mode", "append"),
        ("signal", f"B:USR1@{slurm.warn_s}"),
    ]
    known = [f"--{name}={sbatch_value(str(value))}" for name, value in options if value is not None]
    return [*known, "--requeue" if launcher.chain == 1 else "--no-requeue", *map(_option, slurm.sbatch)]


def _option(text: str) -> str:
    """One further option of the user's, with its value quoted unless that has been done."""
    name, equals, value = text.partition("=")
    return text if not equals or value.startswith(("'", '"')) else f"{name}={sbatch_value(value)}"


def _in_container(slurm: SlurmConfig, job: Job) -> tuple[list[str], list[str]]:
    """(command that is Python, options of srun)."""
    container = slurm.container
    if container is None:
        return [slurm.python or sys.executable], []
    python = slurm.python or "python3"
    mounts = _mounts(container, job)
    if container.runtime == "pyxis":
        options = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        return [python], [*options, f"--container-workdir={job.folder}", *container.flags]
    binds = [f"--bind={mount}" for mount in mounts]
    return ["apptainer", "exec", *binds, f"--pwd={job.folder}", *container.flags, container.image, python], []


def _mounts(container: ContainerConfig, job: Job) -> list[str]:
    folders: Sequence[Path] = [job.folder, job.run]
    outside = [str(path) for path in folders if not any(other in path.parents for other in folders)]
    ours = [f"{path}:{path}" for path in dict.fromkeys(outside)]
    return [*ours, *(mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts)]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def describe(launcher: LauncherConfig) -> str:
    """`4 nodes x 8 processes, srun`."""
    nodes = "1 node" if launcher.nodes == 1 else f"{launcher.nodes} nodes"
    each = launcher.processes_per_node
    return f"{nodes} x {each} process{'es' if each > 1 else ''}, {launcher.mode}"
