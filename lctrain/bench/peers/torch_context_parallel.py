"""torch's own context parallelism: the ring templates that `context_parallel` uses, which knows no rule for the CPU kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.bench.attention_problem import Problem
from lctrain.bench.peers.peer import Attend, Peer, uneven, zigzag

_aten = torch.ops.aten


def _forward_block(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)


def _backward_block(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, is_causal: bool, grad_out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out.to(query.dtype), query, key, value, out, logsumexp, 0.0, is_causal, scale=scale
    )


def _templates() -> Any:
    from torch.distributed.tensor.experimental._context_parallel import _attention

    return _attention


class _RingAttention(torch.autograd.Function):
    """[B, H, T, D]; as the operators that torch registers for CUDA."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group, scale = dist.group.WORLD, q.shape[-1] ** -0.5
        out, lse = _templates()._templated_ring_attention(group, 2, _forward_block, q, k, v, is_causal=True, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, scale = dist.group.WORLD, q.shape[-1] ** -0.5
        return _templates()._templated_ring_attention_backward(
            group, 2, _backward_block, grads[0], "grad_out", q, k, v, out, lse, True, scale=scale
        )


def _prepare(method: str, rank: int, world_size: int, problem: Problem) -> Attend:
    _templates()._cp_options.rotate_method = _templates()._RotateMethod[method]
    return lambda q, k, v: _RingAttention.apply(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


RING, ALL_GATHER = (
    Peer(
        name=f"torch context parallel, {method.lower().replace('_', '-')}",
        family=family,
        packages=("torch.distributed.tensor.experimental._context_parallel",),
        install="pip install 'torch>=2.13'",
        kernel="torch's CPU flash operator",
        layout=zigzag,
        prepare=partial(_prepare, method),
        refuses=uneven,
    )
    for method, family in (("ALL_TO_ALL", "ring"), ("ALL_GATHER", "all_gather"))
)
