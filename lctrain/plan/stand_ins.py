"""What takes the place of code that would read data, or would run otherwise than on a GPU, in a rehearsal on meta tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lctrain.kernels.attention import fused as attention
from lctrain.kernels.permute.fused import Permutation, permutation
from lctrain.models.moe.tokens import Tokens
from lctrain.parallel.dispatch import Dispatch
from lctrain.parallel.exchange import ToHeads, ToTokens
from lctrain.parallel.executor import ScheduledAttention
from lctrain.parallel.group import RankGroup
from lctrain.plan.counting import CostCounter


@dataclasses.dataclass(frozen=True)
class KnownTokens(Tokens):
    """Tokens whose number is known without a look at them."""

    known_total: int = 0

    @property
    def total(self) -> int:
        """See Tokens."""
        return self.known_total


def known(tokens: Tokens, device: torch.device) -> KnownTokens:
    """The same tokens, on a device that may hold no data."""
    tensors = {name: None if x is None else x.to(device) for name, x in vars(tokens).items()}
    return KnownTokens(**tensors, known_total=tokens.total)  # type: ignore[arg-type]


@contextlib.contextmanager
def attention_marked(counter: CostCounter) -> Iterator[None]:
    """Inside, the counter is told what runs around the attention kernel."""

    def marked(run: Callable[..., Any]) -> Any:
        def within(*args: Any) -> Any:
            with counter.inside_attention():
                return run(*args)

        return staticmethod(within)

    with contextlib.ExitStack() as stack:
        for function in (ScheduledAttention, ToHeads, ToTokens):
            for way in ("forward", "backward"):
                stack.enter_context(patch.object(function, way, marked(getattr(function, way))))
        yield


@contextlib.contextmanager
def shapes_suffice(counter: CostCounter, on_cuda: bool, tensor_parallel: bool) -> Iterator[None]:
    """Inside, the model runs on meta tensors, routing is even, and with on_cuda every tensor says that it lies on a GPU.

    FakeTensor, torch's own pretence, costs ten times as much per operator, and cannot say so either: autograd wants a driver.
    """

    def rows_times(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], matrices.shape[2])
        moved = x.nbytes + matrices.nbytes + ends.nbytes + y.nbytes
        counter.operation("aten._grouped_mm", 2 * x.numel() * matrices.shape[2], moved)
        if on_cuda:
            y.masked_fill_((torch.arange(len(y), device=y.device) >= ends[-1])[:, None], 0)
        return y

    def outer_products(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        products = a.new_empty(len(ends), a.shape[1], b.shape[1])
        moved = a.nbytes + b.nbytes + ends.nbytes + products.nbytes
        counter.operation("aten._grouped_mm", 2 * a.numel() * b.shape[1], moved)
        if on_cuda:
            products.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
        return products

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide: Tensor = _RmsNorm.apply(x.to(torch.promote_types(x.dtype, torch.float32)), weight, counter)
        return wide.to(x.dtype)

    routing = _EvenRouting()
    replaced: dict[str, Any] = {
        "lctrain.kernels.grouped_linear.fused.rows_times": rows_times,
        "lctrain.kernels.grouped_linear.fused.outer_products": outer_products,
        "lctrain.models.moe.moe.permutation": routing.permutation,
        "lctrain.kernels.ssd.best.mamba_ssm_fits": lambda *_: False,  # its kernels want data
        "lctrain.kernels.attention.fused._mask": lru_cache(attention._mask.__wrapped__),  # a plan does not know what ran before
    }
    if on_cuda:
        replaced["lctrain.models.layers.rms_norm"] = rms_norm
    with contextlib.ExitStack() as stack:
        for name, stand_in in replaced.items():
            stack.enter_context(patch(name, stand_in))
        stack.enter_context(patch.object(Dispatch, "plan", routing.plan))
        if tensor_parallel:
            from megatron.core.tensor_parallel import mappings

            from lctrain.models import megatron_layers  # noqa: F401  (which may replace the same name)

            stack.enter_context(patch.object(mappings, "torch", _TorchOnMeta("torch")))
        if on_cuda:
            stack.enter_context(patch.object(Tensor, "is_cuda", True))
        yield


class _TorchOnMeta(types.ModuleType):
    """torch, but what megatron-core's mappings make on `torch.cuda.current_device()` has no data."""

    cuda = types.SimpleNamespace(current_device=lambda: torch.device("meta"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _RmsNorm(torch.autograd.Function):
    """What aten._fused_rms_norm keeps, reads and writes: CUDA has it as one kernel, the CPU composes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counter: CostCounter) -> Tensor:
        y, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1)
        ctx.save_for_backward(x, weight, inverse)
        ctx.counter = counter
        counter.operation("aten._fused_rms_norm", 0, x.nbytes + weight.nbytes + y.nbytes + inverse.nbytes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        moved = dy.nbytes + x.nbytes + inverse.nbytes + 2 * weight.nbytes + dx.nbytes
        ctx.counter.operation("aten._fused_rms_norm_backward", 0, moved)
        return dx, dweight, None


def even_counts(choices: int, n_experts: int) -> list[int]:
    """Rows of every expert if `choices` are spread as evenly as can be."""
    return [choices // n_experts + (expert < choices % n_experts) for expert in range(n_experts)]


class _EvenRouting:
    """In place of `permutation` and `Dispatch.plan`, which read how many rows each expert gets."""

    rows = 0
    """Of this rank, in the batch that was last sorted. Every rank has as many."""

    def permutation(self, experts: Tensor, n_experts: int, kept: Tensor | None = None) -> Permutation:
        """Even routing exceeds no expert's capacity: all choices stay."""
        self.rows = experts.numel()
        return permutation(experts if kept is None else experts.masked_fill(~kept, n_experts), n_experts)

    def plan(self, counts: Tensor, ep: RankGroup, etp: RankGroup) -> Dispatch:
        """See Dispatch.plan."""
        local = len(counts) // ep.size
        if ep.size == etp.size == 1:
            return Dispatch(ep, etp, counts.cumsum(0).to(torch.int32), None)
        received = ep.all_to_all("expert_counts", counts, [local] * ep.size, [local] * ep.size)
        gathered = etp.all_gather("expert_counts", received).view(-1, local)
        even = even_counts(self.rows, len(counts))
        send = tuple(sum(even[peer * local : (peer + 1) * local]) for peer in range(ep.size))
        receive = (send[ep.rank],) * ep.size
        slices = (sum(receive),) * etp.size
        ends = gathered.sum(0).cumsum(0).to(torch.int32)
        order = torch.argsort(counts.new_empty(sum(slices)), stable=True)
        return Dispatch(ep, etp, ends, order, send, receive, slices)
