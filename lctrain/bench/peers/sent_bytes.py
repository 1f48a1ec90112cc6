"""Bytes that any library hands to torch.distributed, counted below all its wrappers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode


class SentBytes(TorchDispatchMode):
    """Within `with SentBytes(counter):`, adds to counter[operation] what this rank sends to others.

    A collective counts what has to leave a rank, however the backend does it: for all-gather the own shard to everyone else,
    for reduce-scatter everyone else's shard, for all-to-all all but the own part, for all-reduce both halves of a ring.
    """

    def __init__(self, counter: Counter[str]) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then do it."""
        name = func._overloadpacket._qualified_op_name
        if name in _SENT:
            self.counter[name.rpartition(":")[2].strip("_")] += _SENT[name](*args)
        elif name.partition("::")[0] in ("c10d", "_c10d_functional") and name not in _SILENT:
            raise NotImplementedError(f"bytes of {name} are not counted")
        return func(*args, **(kwargs or {}))


def _all_to_all(tensor: Tensor, splits: Sequence[int], group: dist.ProcessGroup) -> int:
    """splits: rows for each rank; empty: equally many."""
    if not splits:
        return tensor.nbytes * (group.size() - 1) // group.size()
    rows = sum(splits) - splits[group.rank()]
    return tensor.nbytes * rows // max(1, tensor.shape[0])


def _reduced(tensor: Tensor, size: int) -> int:
    return 2 * tensor.nbytes * (size - 1) // size


def _group(boxed: Any) -> dist.ProcessGroup:
    return dist.ProcessGroup.unbox(boxed)


_SENT: dict[str, Callable[..., int]] = {
    "c10d::send": lambda tensors, *rest: sum(tensor.nbytes for tensor in tensors),
    "c10d::_allgather_base_": lambda output, shard, *rest: output.nbytes - shard.nbytes,
    "c10d::allgather_": lambda outputs, shards, group, *rest: sum(x.nbytes for x in shards) * (_group(group).size() - 1),
    "c10d::_reduce_scatter_base_": lambda shard, whole, *rest: whole.nbytes - shard.nbytes,
    "c10d::allreduce_": lambda tensors, group, *rest: sum(_reduced(tensor, _group(group).size()) for tensor in tensors),
    "c10d::alltoall_base_": lambda output, x, group, outs, ins, *rest: _all_to_all(x, ins, _group(group)),
    "_c10d_functional::all_gather_into_tensor": lambda shard, size, name: shard.nbytes * (size - 1),
    "_c10d_functional::reduce_scatter_tensor": lambda whole, op, size, name: whole.nbytes * (size - 1) // size,
    "_c10d_functional::all_reduce": lambda tensor, op, name: _reduced(tensor, _resolve_process_group(name).size()),
    "deepspeed::dim_zero_all_to_all": lambda x, name: x.nbytes * (x.shape[0] - 1) // x.shape[0],  # hides its collective
    "_c10d_functional::all_to_all_single": lambda x, outs, ins, name: _all_to_all(x, ins, _resolve_process_group(name)),
}
_SILENT = ("c10d::recv_", "c10d::barrier", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")
"""Operations that send nothing of note."""
