"""DeepSpeed: DistributedAttention (Ulysses) and UlyssesSPAttentionHF (ALST), with torch's SDPA on every rank."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.bench.attention_problem import Problem
from lctrain.bench.peers.peer import Attend, Peer, contiguous, uneven

INSTALL = "pip install --no-deps deepspeed==0.19.8 && pip install einops hjson msgpack ninja py-cpuinfo"


def _initialise() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles an extension here, for half a minute
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def _distributed_attention(rank: int, world_size: int, problem: Problem) -> Attend:
    _initialise()
    from deepspeed.sequence.layer import DistributedAttention

    attention = DistributedAttention(_Sdpa(), dist.group.WORLD, scatter_idx=2, gather_idx=1)
    return lambda q, k, v: attention(q, k, v, 0)


class _Sdpa(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _too_few_heads(problem: Problem, world_size: int) -> str | None:
    if problem.shape.n_kv_heads < world_size:
        return f"asserts that there are at least {world_size} KV heads"
    if problem.shape.n_kv_heads % world_size:
        return f"{problem.shape.n_kv_heads} KV heads on {world_size} ranks fail in its uneven exchange"
    return uneven(problem, world_size)


DISTRIBUTED_ATTENTION = Peer(
    name="DeepSpeed DistributedAttention",
    family="ulysses",
    packages=("deepspeed", "einops", "hjson"),
    install=INSTALL,
    kernel="SDPA",
    layout=contiguous,
    prepare=_distributed_attention,
    refuses=_too_few_heads,
)


def _alst(rank: int, world_size: int, problem: Problem) -> Attend:
    _initialise()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shape, tokens = problem.shape, problem.seq // world_size
    attention = UlyssesSPAttentionHF(
        attn=sdpa_attention_forward,
        batch_size=shape.batch,
        attn_head_count=shape.n_heads,
        attn_head_size=shape.head_dim,
        kv_head_count=shape.n_kv_heads,
        num_hidden_layers=1,
        process_group=dist.group.WORLD,
        local_seq_length=tokens,
        global_seq_length=problem.seq,
    )
    layer = nn.Module()  # what it reads of a decoder layer
    layer.num_key_value_groups, layer.is_causal = shape.n_heads // shape.n_kv_heads, True  # type: ignore[assignment]
    positions = torch.arange(rank * tokens, (rank + 1) * tokens).expand(shape.batch, -1).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = attention(layer, *(x.transpose(1, 2) for x in (q, k, v)), None, position_ids=positions)
        return out.unflatten(-1, (shape.n_heads, shape.head_dim))

    return attend


def _indivisible(problem: Problem, world_size: int) -> str | None:
    heads, kv_heads = problem.shape.n_heads, problem.shape.n_kv_heads
    if heads % world_size or (kv_heads % world_size and world_size % kv_heads):
        return f"refuses {heads} and {kv_heads} heads on {world_size} ranks"
    return uneven(problem, world_size)


ALST = Peer(
    name="ALST UlyssesSPAttentionHF",
    family="ulysses",
    packages=("deepspeed", "einops", "hjson", "transformers"),
    install=f"{INSTALL} && pip install 'transformers>=5'",
    kernel="transformers' SDPA",
    layout=contiguous,
    prepare=_alst,
    refuses=_indivisible,
)
