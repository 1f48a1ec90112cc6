"""Train a model; start the processes on this machine, join those of torchrun or srun, or submit a SLURM job.

usage: lctrain train [model=PRESET] [data=CHOICE] [recipe=CHOICE] [name=value ...] [--config-dir DIR] [--dry-run]

  lctrain train model=tiny
  lctrain train model=tiny parallel.dp=2 parallel.cp=2 trainer.seq_len=8192
  torchrun --nproc-per-node 4 -m lctrain train model=tiny parallel.cp=4
  lctrain train model=tiny launcher=slurm launcher.nodes=4 launcher.processes_per_node=8 --dry-run
  lctrain train model=tiny launcher=slurm_array optim.lr=1e-3,3e-4

Run the same command again to continue from the newest whole checkpoint of run_dir.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.config.sweep import load_sweep
from lctrain.errors import UserError

if TYPE_CHECKING:
    from lctrain.launch.process import Process
    from lctrain.launch.watchdog import Watchdog
    from lctrain.run_dir import RunDir


_SPEAKERS_TIME_S = 30.0


def main(args: list[str]) -> int:
    """Run the command."""
    from lctrain.launch.process import Process

    args = ["launcher.dry_run=true" if argument == "--dry-run" else argument for argument in args]
    process = Process.from_env()
    if process is None:
        return _start_processes(args)
    try:
        return _join_processes(args, process)
    except UserError:
        import torch.distributed as dist

        # All ranks raise it, or before they have met all of one machine: one line is enough. The others wait for torchrun to
        # end them, because the first that leaves has all the rest stopped, the one that speaks among them.
        if (process.rank if dist.is_initialized() else process.local_rank) != 0:
            time.sleep(_SPEAKERS_TIME_S)  # past it nobody has spoken: the mistake is this rank's alone
        raise


def _start_processes(args: list[str]) -> int:
    from lctrain.launch.signals import Stopped, stop_at_once

    # Forked children can use CUDA only if this process never has; asking NVML instead of CUDA keeps it so.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    try:
        with stop_at_once():
            configs = load_sweep(args)
            config = configs[0].config
            if config.launcher.is_slurm:
                from lctrain.launch.slurm import submit

                return submit(configs)
            with _prepare(config):
                from lctrain.launch.local import launch_local

                return launch_local(_rank_main, config)
    except Stopped as stopped:
        print(f"stopped by {stopped} before training began", file=sys.stderr)
        return 0


def _rank_main(config: TrainConfig, process: Process, rendezvous: str | None) -> int:
    from lctrain.devices import choose_device
    from lctrain.launch.meet import meet
    from lctrain.launch.watchdog import Watchdog
    from lctrain.run_dir import RunDir

    device = choose_device(config.engine.device, process.local_rank, process.local_size)
    with Watchdog(process.rank, process.world_size, config.launcher.watchdog_s, speak=False) as watchdog:
        watchdog.post_to(RunDir(config.run_dir))
        watchdog.phase("meeting the other ranks")
        meet(process, rendezvous, device.type, config.launcher.timeout_s)
        return _train(config, process, watchdog)


def _train(config: TrainConfig, process: Process, watchdog: Watchdog) -> int:
    from lctrain.launch.process import leave_process_group
    from lctrain.launch.signals import StopRequest
    from lctrain.train import train

    with StopRequest():  # no signal may end a rank that waits for rank 0 to draw the loss curve
        status = train(config, process, watchdog)
        watchdog.phase("waiting for the end of the other ranks")
        leave_process_group()
    return status


def _join_processes(args: list[str], process: Process) -> int:
    """One rank that torchrun, or anything that sets its variables, has started."""
    return join(load(TrainConfig, "train", [*args, f"launcher.processes={process.world_size}"]), process)


def join(config: TrainConfig, process: Process) -> int:
    """Be one rank of a run that others have started; they meet at MASTER_ADDR and MASTER_PORT."""
    from lctrain.checkpoint.agree import from_rank_0
    from lctrain.devices import choose_device
    from lctrain.launch.meet import meet, meeting_place
    from lctrain.launch.rank import end_with_torchrun
    from lctrain.launch.watchdog import Watchdog
    from lctrain.run_dir import RunDir

    end_with_torchrun()
    device = choose_device(config.engine.device, process.local_rank, process.local_size)
    where = f" at {meeting_place()}: are all {process.world_size} started, and does nothing else listen there?"
    with ExitStack() as held:
        watchdog = Watchdog(process.rank, process.world_size, config.launcher.watchdog_s, speak=True, meeting_place=where)
        held.enter_context(watchdog)
        watchdog.phase("meeting the other ranks")
        meet(process, None, device.type, config.launcher.timeout_s)
        watchdog.phase("preparing the run")
        from_rank_0(lambda: held.enter_context(_prepare(config)) and None)
        watchdog.post_to(RunDir(config.run_dir))
        status = _train(config, process, watchdog)
    sys.stdout.flush()
    return status


def _prepare(config: TrainConfig) -> RunDir:
    """What happens once per run, before any rank trains: the corpora exist and fit, the run directory is ours."""
    from lctrain.data.prepare import ensure_corpora
    from lctrain.run_dir import RunDir
    from lctrain.tracking.tensorboard import check_tensorboard
    from lctrain.tracking.wandb import check_wandb

    check_wandb(config)
    check_tensorboard(config)
    if config.init_from is not None:
        from lctrain.initial_weights import check_initial

        check_initial(config)
    ensure_corpora(config.data, config.model.vocab_size)
    return RunDir(config.run_dir).prepare()
