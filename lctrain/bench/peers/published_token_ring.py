"""TokenRing as published with its paper (arXiv 2412.20501): forward only, from a clone of its repository."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from lctrain.bench.attention_problem import Problem
from lctrain.bench.peers import flash_stand_in
from lctrain.bench.peers.peer import Attend, Peer, uneven, zigzag


def _prepare(rank: int, world_size: int, problem: Problem) -> Attend:
    flash_stand_in.install()
    from flash_attn.flash_attn_interface import _flash_attn_forward
    from token_ring import zigzag_token_ring

    def older_interface(*args: Any, window_size: tuple[int, int], **settings: Any) -> tuple[Tensor | None, ...]:
        """It was written for flash-attn 2.5, which returns eight tensors."""
        out, lse, *_ = _flash_attn_forward(*args, **settings)
        return out, None, None, None, None, lse, None, None

    zigzag_token_ring._flash_attn_forward = older_interface
    groups = {"q_group": dist.new_group(), "out_group": dist.new_group()}
    return lambda q, k, v: zigzag_token_ring.zigzag_ring_flash_attn_func(q, k, v, causal=True, **groups)


TOKEN_RING = Peer(
    name="TokenRing as published",
    family="token_ring",
    packages=("token_ring", "nvtx"),
    install=(
        "pip install nvtx && git clone https://github.com/ACA-Lab-SJTU/token-ring"
        " && export PYTHONPATH=$PWD/token-ring/casual_test"
    ),
    kernel="stand-in for flash_attn",
    layout=zigzag,
    prepare=_prepare,
    refuses=lambda problem, world_size: "one row only" if problem.shape.batch > 1 else uneven(problem, world_size),
    backward=False,
)
