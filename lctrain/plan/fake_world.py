"""A grid of processes that is not there: torch's "fake" process group, in which collectives return at once and send nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch.distributed as dist


@contextlib.contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[None]:
    """Inside, this process is `rank` of `size`; afterwards it belongs to no process group, as before.

    Process groups can be made, and collectives be called on tensors of any kind; the contents of what they give are undefined.
    """
    assert not dist.is_initialized(), "a rehearsal would disturb the process group that this process belongs to"
    import torch.distributed._tools.fake_collectives  # noqa: F401  (gives the collectives a form for tensors on "meta")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    devices = dist.Backend.backend_capability
    with patch.dict(devices, {"fake": [*devices["fake"], "meta"]}):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            yield
        finally:
            dist.destroy_process_group()
