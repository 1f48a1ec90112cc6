"""ring-flash-attention: its zigzag ring, and its all-gather in the manner of Llama 3."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.bench.attention_problem import Problem
from lctrain.bench.peers import flash_stand_in
from lctrain.bench.peers.peer import Attend, Peer, contiguous, uneven, zigzag

INSTALL = "pip install --no-deps ring-flash-attn==0.1.8 && pip install 'transformers>=5'"


def _import() -> None:
    import transformers.modeling_flash_attention_utils as utils

    # 0.1.8 imports this name, of which newer versions of transformers have no need. It does not use it for what runs here.
    utils.__dict__.setdefault("is_flash_attn_greater_or_equal_2_10", lambda: True)
    flash_stand_in.install()


def _zigzag_ring(rank: int, world_size: int, problem: Problem) -> Attend:
    _import()
    from ring_flash_attn import zigzag_ring_flash_attn_func

    return lambda q, k, v: zigzag_ring_flash_attn_func(q, k, v, causal=True, group=dist.group.WORLD)


ZIGZAG_RING = Peer(
    name="ring-flash-attention, zigzag",
    family="ring",
    packages=("ring_flash_attn", "transformers"),
    install=INSTALL,
    kernel="stand-in for flash_attn",
    layout=zigzag,
    prepare=_zigzag_ring,
    refuses=uneven,
)


def _llama3(rank: int, world_size: int, problem: Problem) -> Attend:
    _import()
    from ring_flash_attn import llama3_flash_attn_prepare_cu_seqlens, llama3_flash_attn_varlen_func

    borders = torch.tensor([0, problem.seq], dtype=torch.int32)
    cu_q, cu_k, longest_q, longest_k, keys = llama3_flash_attn_prepare_cu_seqlens(borders, True, rank, world_size)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = llama3_flash_attn_varlen_func(
            *(x.squeeze(0) for x in (q, k, v)), cu_q, cu_k, longest_q, longest_k, heads_k_stride=k.shape[2], local_k_slice=keys,
            causal=True, group=dist.group.WORLD,
        )  # fmt: skip
        return out.unsqueeze(0)

    return attend


LLAMA3 = Peer(
    name="ring-flash-attention, llama3",
    family="all_gather",
    packages=("ring_flash_attn", "transformers"),
    install=INSTALL,
    kernel="stand-in for flash_attn",
    layout=contiguous,
    prepare=_llama3,
    refuses=lambda problem, world_size: "one row only" if problem.shape.batch > 1 else uneven(problem, world_size),
)
