"""One rank of a batch job: `python -m lctrain.slurm.rank CONFIG OUTCOME`, started by srun, or by the torchrun of its node.

OUTCOME gets `finished`, `stopped` (told to, saved; the script requeues) or `refused` (settings or data do not fit: no requeue).
Exit status 0 for the first two, since srun with --kill-on-bad-exit would end the other ranks for any other.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lctrain.errors import UserError
from lctrain.launch.signals import StopRequest
from lctrain.slurm.outcome import claim_outcome, write_outcome

if TYPE_CHECKING:
    from lctrain.config.schema import TrainConfig
    from lctrain.launch.process import Process
    from lctrain.run_dir import RunDir


def main(config_file: Path, outcome: Path) -> NoReturn:
    """Run the rank and leave without exit handlers, which might wait for threads of libraries that wait for other ranks."""
    # torchrun would die of the warning, so it is started with the signal ignored, which is inherited.
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    with StopRequest():  # from here on, before torch is imported, no warning is lost
        status = _run(config_file, outcome)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _run(config_file: Path, outcome: Path) -> int:
    from lctrain.config.render import from_yaml
    from lctrain.config.schema import TrainConfig
    from lctrain.launch.process import Process
    from lctrain.launch.rank import one_line, redirect, write_trace
    from lctrain.run_dir import RunDir
    from lctrain.tracking.jsonl import append_event

    speaker = os.fdopen(os.dup(2), "w", buffering=1)  # the job's log, also after the other ranks' output goes elsewhere
    process, log = Process(0, 1, 0, 1), None
    try:
        config = from_yaml(TrainConfig, config_file.read_text())
        process = Process.from_env() or process
        run = RunDir(config.run_dir)
        log = run.rank_log(process.rank)
        redirect(process, log)
        _train(config, process)
        if process.rank == 0:
            write_outcome(outcome, "stopped" if _was_stopped(run) else "finished")
        return 0
    except UserError as error:
        if claim_outcome(outcome, "refused"):
            speaker.write(f"error: {error}\n")
        return 2
    except BaseException as error:
        name = f"rank {process.rank} (pid {os.getpid()} on {os.uname().nodename})"
        line = f"{name} failed: {one_line(error)}; trace in {log}"
        speaker.write(f"{line}\n")
        write_trace(log)
        if log is not None:
            append_event(run.events, "failure", rank=process.rank, pid=os.getpid(), status=1, message=line)
        return 1


def _train(config: TrainConfig, process: Process) -> None:
    import torch

    from lctrain.commands.train import join

    if process.world_size != config.processes:
        raise UserError(
            f"SLURM started {process.world_size} processes, the settings say launcher.processes={config.processes}:"
            " submit the run again"
        )
    cores = len(os.sched_getaffinity(0))
    threads = config.launcher.threads or config.launcher.slurm.cpus_per_process or max(1, cores // process.local_size)
    torch.set_num_threads(threads)
    join(config, process)


def _was_stopped(run: RunDir) -> bool:
    """Whether the training that has just returned was told to stop before its last step."""
    from lctrain.tracking.jsonl import read_events

    kinds = [event["kind"] for event in read_events(run.events) if event["kind"] in ("start", "resume", "stop", "end")]
    return kinds[-1:] == ["stop"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
