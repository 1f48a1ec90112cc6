"""Which process of the run this is, and how the processes find each other."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from datetime import timedelta

from lctrain.errors import UserError
from lctrain.launch.slurm_env import set_meeting_place, srun_task


@dataclasses.dataclass(frozen=True)
class Process:
    """One process of a run; `local_*` count the processes on this machine, which is also the number of the CUDA device."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Process | None:
        """The process that torchrun (or a launcher that sets the same variables) or srun started, None if none of them did."""
        if "RANK" not in env or "WORLD_SIZE" not in env:
            task = srun_task(env)
            return cls(*task) if task is not None else None
        try:
            rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
            process = cls(rank, world_size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world_size)))
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers: {error}") from None
        if not (0 <= rank < world_size and 0 <= process.local_rank < process.local_size <= world_size):
            raise UserError(f"RANK={rank}, WORLD_SIZE={world_size}, LOCAL_RANK={process.local_rank} do not fit together")
        return process


def init_process_group(process: Process, rendezvous: str | None, device: str, timeout_s: float) -> None:
    """Join the run's default process group; also a run of one process gets one, so that no caller needs a special case.

    rendezvous: a `file://` URL on this machine, fresh for every launch, or None for the MASTER_ADDR and MASTER_PORT of torchrun
        or SLURM.
    device: `cpu` takes gloo; `cuda` takes NCCL for CUDA tensors and gloo for CPU tensors, and selects this process's device.
    timeout_s: a collective, or the meeting itself, that is blocked for longer raises.
    """
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(process.local_rank)
    if rendezvous is not None:
        # All ranks are on this machine: do not depend on whether its host name resolves.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        set_meeting_place(os.environ)
    alone = process.world_size == 1
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.HashStore() if alone else None,
        init_method=None if alone else rendezvous or "env://",
        rank=process.rank,
        world_size=process.world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def leave_process_group() -> None:
    """End this process's part in the run's process groups, once all others have come to their end too.

    A gloo group that is destroyed while a peer still uses it can abort the peer.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
