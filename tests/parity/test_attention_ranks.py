"""Sequence-parallel attention against the textbook formula in fp64, where any mistake is far larger than rounding."""

from __future__ import annotations

import random
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.kernels.attention import fused, reference
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.deal import make_layout
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.strategies import STRATEGIES
from lctrain.parallel.strategy import NAMES, Strategy

EXACT = 1e-11
HEADS = ((4, 4), (4, 2), (4, 1), (3, 3), (6, 2), (2, 2), (8, 1))


def random_case(draw: random.Random, name: str, world: int) -> tuple[Strategy, SequenceLayout, AttentionMask, int]:
    length = draw.choice([1, 7, 64, draw.randint(1, 300)])
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    strategy = Strategy(
        name,
        ulysses=draw.choice([None, *divisors]),
        ring=draw.choice(list(STRATEGIES)),
        nesting=draw.choice(["inner", "outer"]),
        node=draw.choice([None, *divisors]),
    )
    batch = draw.choice([1, 2])
    rows = tuple(
        (0, *sorted({draw.randint(1, length) for _ in range(draw.randint(1, 6))})) for _ in range(draw.choice([1, batch]))
    )
    mask = AttentionMask(rows, draw.random() < 0.7, draw.choice([None, None, 1, 3, 40]))
    return strategy, make_layout(draw.choice((*KINDS, "balanced")), world, length, rows), mask, batch


def whole_attention(leaves: list[Tensor], sinks: Tensor | None, dout: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """out and lse of one process; gradients go to the leaves."""
    out, lse = reference.attention(*leaves, mask.live(dout.shape[1]).expand(len(dout), -1, -1))
    if sinks is not None:
        total = torch.logaddexp(lse, sinks[:, None])
        out, lse = out * (lse - total).exp().transpose(1, 2).unsqueeze(-1), total
    out.backward(dout)
    return out.detach(), lse.detach()


def compare(rank: int, world_size: int, name: str, cases: int) -> None:
    draw = random.Random(f"{name} {world_size}")
    group = RankGroup(dist.group.WORLD if world_size > 1 else None)
    for index in range(cases):
        strategy, layout, mask, batch = random_case(draw, name, world_size)
        torch.manual_seed(index)
        n_heads, n_kv_heads = draw.choice(HEADS)
        sizes = [(batch, layout.length, n, 16) for n in (n_heads, n_kv_heads, n_kv_heads, n_heads)]
        q, k, v, dout = (torch.randn(size, dtype=torch.float64) for size in sizes)
        sinks = torch.randn(n_heads, dtype=torch.float64) if draw.random() < 0.4 else None
        scores = None if sinks is None else sinks.clone().requires_grad_()
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = whole_attention(leaves, scores, dout, mask)

        shards = [layout.shard(x, rank, 1, pad=5.0).requires_grad_() for x in (q, k, v)]
        part_scores = None if sinks is None else sinks.clone().requires_grad_()
        with patch.object(fused, "LARGE", draw.choice([1, fused.LARGE])):  # head by head, and all at once
            part, part_lse = sequence_parallel_attention(
                *shards, layout=layout, mask=mask, group=group, strategy=strategy, sinks=part_scores
            )
            part.backward(layout.shard(dout, rank, 1, pad=5.0))

        case = (strategy, layout, layout.owners, mask, n_heads, n_kv_heads, sinks is not None)
        wanted = [out, *(leaf.grad for leaf in leaves)]
        for found, whole in zip([part.detach(), *(shard.grad for shard in shards)], wanted, strict=True):
            assert torch.allclose(found, layout.shard(whole, rank, 1), rtol=0, atol=EXACT), case
        real = layout.indices(rank) < layout.length
        assert torch.allclose(part_lse[..., real], layout.shard(lse, rank, 2)[..., real], rtol=0, atol=EXACT), case
        padding = layout.indices(rank) >= min(borders[-1] for borders in mask.documents) if len(mask.documents) == 1 else ~real
        for found in (part.detach(), *(shard.grad for shard in shards)):
            assert not found[:, padding].any(), case
        if scores is not None:
            gradient = torch.zeros_like(sinks) if part_scores.grad is None else part_scores.grad
            if world_size > 1:
                dist.all_reduce(gradient)
            assert torch.allclose(gradient, scores.grad, rtol=0, atol=EXACT), case


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_exact(name: str, world_size: int) -> None:
    run_ranks(compare, world_size, name, 12)


def test_six_ranks() -> None:
    """Two ways to be two-dimensional: 2 x 3 and 3 x 2."""
    for name in ("usp", "double_ring"):
        run_ranks(compare, 6, name, 8)


def sinks_gradient(rank: int, world_size: int) -> Tensor | None:
    """Two heads on three ranks: one has none."""
    torch.manual_seed(0)
    layout = SequenceLayout("zigzag", world_size, 30)
    q, k, v = (torch.randn(1, layout.local_length, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    mask = AttentionMask(((0, 30),), causal=True)
    group = RankGroup(torch.distributed.group.WORLD)
    out, _ = sequence_parallel_attention(q, k, v, layout=layout, mask=mask, group=group, strategy="ulysses", sinks=sinks)
    out.sum().backward()
    return sinks.grad


def test_a_rank_without_heads_still_has_a_gradient_of_sinks() -> None:
    """Data parallelism waits for every parameter's gradient."""
    grads = run_ranks(sinks_gradient, 3)
    assert [grad is not None for grad in grads] == [True] * 3
    assert sorted(bool((grad != 0).any()) for grad in grads) == [False, True, True]
