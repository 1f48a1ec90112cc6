"""Counting what runs, on real or fake tensors: kernels with FLOPs and bytes, memory that is alive, bytes that are sent."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lctrain.plan.cost import Operation, PassCost, Sent

_aten = torch.ops.aten

ATTENTION_KERNELS = {
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _aten._flash_attention_forward,
    _aten._flash_attention_backward,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_efficient_attention_backward,
}
"""What the simulator prices."""

IN_ATTENTION = "attention."
"""Begins the names of operations without matrix products that a sequence-parallel strategy runs around the attention kernel."""

_NO_KERNEL = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.lift_fresh,
    _aten.scalar_tensor,
    _aten._local_scalar_dense,
}
"""Allocate or read, but run nothing on a device."""

_OVERWRITES = {_aten.copy_, _aten.zero_, _aten.fill_}
"""In-place operations that do not read what they change."""

_READS_ROWS = {_aten.index_select, _aten.embedding, _aten.gather, _aten.index}
"""Read as much of their first argument as they return, not all of it."""

_WRITES_ROWS = {_aten.index_add_, _aten.index_copy_, _aten.index_put_, _aten.scatter_add_, _aten.scatter_}
"""Read and change as much of their first argument as their last tensor holds."""


class CostCounter(TorchDispatchMode):
    """While active, counts every kernel that torch starts and every tensor's storage from its birth to its death.

    dimensions: process groups -> dimension of the mesh, for collectives that are called directly and not through a
        CountedGroup.

    live: bytes of all storages made while active that are still alive. peak: the most of it since `begin`.
    """

    def __init__(self, dimensions: dict[dist.ProcessGroup, str] | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._dimensions = dimensions or {}
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._told = self._inside = 0
        self.begin()

    def begin(self) -> None:
        """Forget what was counted; what is alive stays known."""
        self.peak = self.live
        self._operations: Counter[tuple[str, int, int]] = Counter()
        self._sent: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def cost(self, held: int) -> PassCost:
        """What was counted since `begin`. held: bytes of the peak that others answer for."""
        operations = tuple(Operation(*key, calls) for key, calls in self._operations.items())
        sent = tuple(Sent(*key, *counts) for key, counts in self._sent.items())
        return PassCost(operations, sent, self.peak - held)

    def operation(self, name: str, flops: int, size: int) -> None:
        """Count one kernel."""
        if self._inside and not flops:
            name = IN_ATTENTION + name
        self._operations[name, flops, size] += 1

    def sent(self, dimension: str, collective: str, size: int, calls: int = 1) -> None:
        """Count bytes that leave this rank."""
        counts = self._sent[dimension, collective]
        counts[0] += size
        counts[1] += calls

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Inside, collectives are not counted: somebody who knows more about them does."""
        self._told += 1
        try:
            yield
        finally:
            self._told -= 1

    @contextlib.contextmanager
    def inside_attention(self) -> Iterator[None]:
        """Inside, operations run around the attention kernel; see IN_ATTENTION."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def track(self, tensor: Tensor) -> None:
        """Count a tensor's storage as long as it lives, if it is not known yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._died(key)), size
        self.live += size
        self.peak = max(self.peak, self.live)

    def _died(self, key: int) -> None:
        _, size = self._storages.pop(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func.namespace == "c10d":
            if not self._told:
                self._collective(func, args)
            return result
        results = _tensors([result])
        if not results:
            return result
        given = _tensors([*args, *kwargs.values()])
        old = {x.untyped_storage()._cdata for x in given}
        fresh = [x for x in results if x.untyped_storage()._cdata not in old]
        for tensor in fresh:
            self.track(tensor)
        packet = func.overloadpacket
        if (fresh or func._schema.is_mutable) and packet not in _NO_KERNEL and packet not in ATTENTION_KERNELS:
            if packet is _aten.copy_ and _bytes(args[1]) == args[1].element_size():  # what filling is on the meta device
                packet = _aten.fill_
            self.operation(str(packet), _flops(packet, args, kwargs, result), _moved(func, given, fresh, args, kwargs))
        return result

    def _collective(self, func: Any, args: tuple) -> None:
        """A collective of torch.distributed's that nobody announced, such as megatron-core's."""
        group = next(dist.ProcessGroup.unbox(x) for x in args if isinstance(x, torch.ScriptObject) and _is_group(x))
        size, dimension = group.size(), self._dimensions[group]
        name = func.overloadpacket.__name__
        tensors = _tensors(args[:2])
        largest = max(x.nbytes for x in tensors)
        share = largest * (size - 1) // size
        kinds = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
        assert name in kinds, f"a collective that nobody has a formula for: {func}"
        self.sent(dimension, kinds[name], 2 * share if name == "allreduce_" else share)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those among an operator's arguments or results, which may be lists."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _is_group(boxed: torch.ScriptObject) -> bool:
    return "ProcessGroup" in boxed._type().qualified_name()


def _flops(packet: Any, args: tuple, kwargs: dict, result: Any) -> int:
    """Multiply-adds x 2 of a matrix product."""
    if packet is _aten._grouped_mm:  # rows [M, K] by group times [E, K, N], or [N, M] times [M, K] by group
        return 2 * args[0].numel() * args[1].shape[-1]
    rule = flop_registry.get(packet) or flop_registry.get(getattr(_aten, packet.__name__.removesuffix("_"), None))
    return 0 if rule is None else int(rule(*args, **kwargs, out_val=result))


def _moved(func: Any, given: list[Tensor], fresh: list[Tensor], args: tuple, kwargs: dict) -> int:
    """Bytes that a kernel reads and writes."""
    packet = func.overloadpacket
    if packet in _READS_ROWS:
        return 2 * _sum(fresh) + _sum(given[1:])
    if packet in _WRITES_ROWS:
        return 2 * _bytes(given[-1]) + _sum(given[1:])
    written, read = list(fresh), []
    for argument, value in zip(func._schema.arguments, (*args, *(None,) * len(func._schema.arguments)), strict=False):
        tensors = _tensors([kwargs.get(argument.name, value)])
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += tensors
        if not changed or not (argument.is_out or packet in _OVERWRITES):
            read += tensors
    return _sum(read) + _sum(written)


def _sum(tensors: Iterable[Tensor]) -> int:
    return sum(_bytes(x) for x in tensors)


def _bytes(x: Tensor) -> int:
    """Memory behind a view, entries that stand for many counted once."""
    entries = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        entries *= length if stride else min(length, 1)
    return entries * x.element_size()
