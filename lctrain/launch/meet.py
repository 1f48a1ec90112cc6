"""The meeting of a run's processes, with a line for the person where it fails."""

from __future__ import annotations

import os

from lctrain.errors import UserError
from lctrain.launch.process import Process, init_process_group


def meet(process: Process, rendezvous: str | None, device: str, timeout_s: float) -> None:
    """init_process_group; UserError if the meeting place is taken, or the others do not come to it."""
    import torch.distributed as dist

    if rendezvous is not None:
        init_process_group(process, rendezvous, device, timeout_s)
        return
    try:
        init_process_group(process, rendezvous, device, timeout_s)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        text = " ".join(str(error).split())
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            what = "is taken by another program: give another --master-port (MASTER_PORT)"
        else:
            what = f"did not bring the {process.world_size} ranks together: {text[:300]}"
        raise UserError(f"rank {process.rank}: the rendezvous at {meeting_place()} {what}") from None


def meeting_place() -> str:
    """`MASTER_ADDR:MASTER_PORT`."""
    return f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
