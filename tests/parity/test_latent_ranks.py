"""Latents that travel, on several ranks: what one process gets with all keys and values in hand."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.kernels.attention import reference
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.attention import sequence_parallel_latent_attention
from lctrain.parallel.cost import traffic
from lctrain.parallel.deal import make_layout
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.strategies import STRATEGIES
from lctrain.parallel.strategy import NAMES, Strategy

EXACT = 1e-10
NOPE, ROPE, RANK = 6, 2, 5
"""Sizes of a head without and with rotation, and of the compressed latent."""
SIZE = NOPE + ROPE


def expand(latent: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As in latent attention: per head, NOPE entries of a key and NOPE of a value; the rest of a key is common to all heads."""
    up = torch.nn.functional.linear(latent[..., :RANK], weight).unflatten(-1, (-1, 2 * NOPE))
    common = latent[..., None, RANK:].expand(*up.shape[:3], ROPE)
    return torch.cat([up[..., :NOPE], common], -1), torch.nn.functional.pad(up[..., NOPE:], (0, ROPE))


def random_case(draw: random.Random, name: str, world: int) -> tuple[Strategy, SequenceLayout, AttentionMask, int, int]:
    length = draw.choice([1, 7, 40, draw.randint(1, 200)])
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    strategy = Strategy(
        name, draw.choice([None, *divisors]), draw.choice(list(STRATEGIES)), node=draw.choice([None, *divisors])
    )
    batch = draw.choice([1, 2])
    rows = tuple((0, *sorted({draw.randint(1, length) for _ in range(draw.randint(1, 6))})) for _ in range(batch))
    layout = make_layout(draw.choice((*KINDS, "balanced")), world, length, rows)
    return strategy, layout, AttentionMask(rows), batch, draw.choice([1, 2, 3, 4])


def compare(rank: int, world_size: int, name: str, cases: int) -> None:
    draw = random.Random(f"{name} {world_size}")
    group = RankGroup(dist.group.WORLD if world_size > 1 else None)
    for index in range(cases):
        strategy, layout, mask, batch, heads = case = random_case(draw, name, world_size)
        torch.manual_seed(index)
        q = torch.randn(batch, layout.length, heads, SIZE, dtype=torch.float64)
        latent = torch.randn(batch, layout.length, RANK + ROPE, dtype=torch.float64)
        weight = torch.randn(heads * 2 * NOPE, RANK, dtype=torch.float64)
        dout = torch.randn_like(q)
        leaves = [x.clone().requires_grad_() for x in (q, latent, weight)]
        out, _ = reference.attention(leaves[0], *expand(leaves[1], leaves[2]), mask.live(layout.length))
        out.backward(dout)

        mine = [layout.shard(x, rank, 1, pad=5.0).requires_grad_() for x in (q, latent)]
        own = weight.clone().requires_grad_()
        group.sent.clear()
        part = sequence_parallel_latent_attention(
            *mine, own, expand, layout=layout, mask=mask, group=group, strategy=strategy, scale=SIZE**-0.5
        )
        forward = dict(group.sent)
        part.backward(layout.shard(dout, rank, 1, pad=5.0))

        for found, whole in zip([part.detach(), *(x.grad for x in mine)], [out, *(x.grad for x in leaves)], strict=False):
            assert torch.allclose(found, layout.shard(whole, rank, 1), rtol=0, atol=EXACT), case
        gradient = torch.zeros_like(own) if own.grad is None else own.grad
        if world_size > 1:
            dist.all_reduce(gradient)
        assert torch.allclose(gradient, leaves[2].grad, rtol=0, atol=EXACT), case
        shape = AttentionShape(batch, heads, heads, SIZE, torch.float64, RANK + ROPE)
        foretold = traffic(strategy, layout, mask, shape, "forward", rank)
        assert {kind: count for kind, count in foretold.items() if count} == {k: n for k, n in forward.items() if n}, case
        back = {kind: group.sent[kind] - forward.get(kind, 0) for kind in group.sent}
        foretold = traffic(strategy, layout, mask, shape, "backward", rank)
        assert {kind: count for kind, count in foretold.items() if count} == {k: n for k, n in back.items() if n}, case


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_exact(name: str, world_size: int) -> None:
    run_ranks(compare, world_size, name, 6)
