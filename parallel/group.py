"""RankGroup: the processes that share one sequence, and the only door through which their tensors travel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor


class RankGroup:
    """Rank, size and point-to-point exchange of a sequence-parallel group, with a count of every byte handed over.

    A group of one needs no process group: `RankGroup()`.

    sent: bytes sent so far by kind of item, exactly as given to the process group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.sent: Counter[str] = Counter()
        self._peers: Sequence[int] = range(self.size)

    def across(self, ranks: Sequence[int]) -> RankGroup:
        """Some ranks of this group, this one among them, as a group of their own: same process group, same byte count."""
        part = RankGroup()
        part.process_group, part.sent, part._peers = self.process_group, self.sent, [self._peers[rank] for rank in ranks]
        part.rank, part.size = list(ranks).index(self.rank), len(ranks)
        return part

    def exchange(self, sends: Sequence[tuple[str, Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[dist.Work]:
        """Start all transfers at once: (kind, contiguous tensor, peer) to send, (contiguous buffer, peer) to fill.

        The order of messages between two ranks must be the same on both. Wait for every returned handle before a buffer is
        used or a sent tensor is changed.
        """
        operations = []
        for kind, tensor, peer in sends:
            self.sent[kind] += tensor.nbytes
            operations.append(dist.P2POp(dist.isend, tensor, group=self.process_group, group_peer=self._peers[peer]))
        for buffer, peer in receives:
            operations.append(dist.P2POp(dist.irecv, buffer, group=self.process_group, group_peer=self._peers[peer]))
        return dist.batch_isend_irecv(operations) if operations else []
