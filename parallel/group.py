"""RankGroup: the processes along one dimension of the mesh, and the only door through which their tensors travel."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


class Waits:
    """Seconds that a process has stood still for others. On CUDA streams wait for messages, which does not show here."""

    seconds = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add what passes inside."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


class RankGroup:
    """Rank, size and exchanges of a group of processes, with a count of every byte handed over.

    A group of one needs no process group: `RankGroup()`.

    sent: bytes sent so far by kind of item, exactly as given to the process group; a gathered tensor counts once for every
        other rank, a summed one once.
    waits: time spent in collectives and waiting for exchanges.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.process_group = process_group
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.sent: Counter[str] = Counter()
        self.waits = Waits()
        self._peers: Sequence[int] = range(self.size)

    def across(self, ranks: Sequence[int]) -> RankGroup:
        """Some ranks of this group, this one among them, as a group of their own: same process group, same counts."""
        part = RankGroup()
        part.process_group, part.sent, part.waits = self.process_group, self.sent, self.waits
        part._peers = [self._peers[rank] for rank in ranks]
        part.rank, part.size = list(ranks).index(self.rank), len(ranks)
        return part

    def exchange(self, sends: Sequence[tuple[str, Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> list[dist.Work]:
        """Start all transfers at once: (kind, contiguous tensor, peer) to send, (contiguous buffer, peer) to fill.

        The order of messages between two ranks must be the same on both. `wait` for every returned handle before a buffer is
        used or a sent tensor is changed.
        """
        operations = []
        for kind, tensor, peer in sends:
            self.sent[kind] += tensor.nbytes
            operations.append(dist.P2POp(dist.isend, tensor, group=self.process_group, group_peer=self._peers[peer]))
        for buffer, peer in receives:
            operations.append(dist.P2POp(dist.irecv, buffer, group=self.process_group, group_peer=self._peers[peer]))
        return dist.batch_isend_irecv(operations) if operations else []

    def wait(self, handles: Sequence[dist.Work]) -> None:
        """Wait for exchanges."""
        with self.waits.timed():
            for handle in handles:
                handle.wait()

    def all_reduce(self, kind: str, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            self._count(kind, tensor.nbytes)
            with self.waits.timed():
                dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def all_gather(self, kind: str, tensor: Tensor) -> Tensor:
        """Every rank's tensor, all of one shape [...]: [size, ...] in the order of ranks."""
        if self.size == 1:
            return tensor[None]
        self._count(kind, tensor.nbytes * (self.size - 1))
        gathered = tensor.new_empty(self.size * tensor.numel())
        with self.waits.timed():
            _gather(gathered, tensor.contiguous().flatten(), group=self.process_group)
        return gathered.view(self.size, *tensor.shape)

    def all_to_all(self, kind: str, tensor: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
        """Rows for every rank, in the order of ranks, against the rows that they have for this one: [sum(receive_rows), ...].

        tensor: [sum(send_rows), ...]. Both lists may hold zeros; rank a's send_rows[b] must be rank b's receive_rows[a].
        """
        if self.size == 1:
            return tensor
        row = tensor[:1].nbytes if len(tensor) else 0
        self._count(kind, row * (sum(send_rows) - send_rows[self.rank]))
        received = tensor.new_empty(sum(receive_rows), *tensor.shape[1:])
        with self.waits.timed():
            dist.all_to_all_single(received, tensor.contiguous(), list(receive_rows), list(send_rows), group=self.process_group)
        return received

    def _count(self, kind: str, size: int) -> None:
        assert len(self._peers) == dist.get_world_size(self.process_group), "part of a group has no collectives of its own"
        self.sent[kind] += size
