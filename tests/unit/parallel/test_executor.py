"""Results do not depend on when messages arrive, nor from run to run; mistakes are refused before anything is sent."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.strategy import NAMES, Strategy


@pytest.fixture(scope="module", autouse=True)
def _end_ranks() -> Iterator[None]:
    yield
    close_pools()


class Sleepy(RankGroup):
    """A group whose ranks dawdle before every exchange, each in its own way."""

    def exchange(self, sends, receives):
        time.sleep(self.random.uniform(0, 4e-3))
        return super().exchange(sends, receives)


def results(rank: int, world_size: int, strategy: Strategy, dtype: torch.dtype, seed: int | None) -> list[Tensor]:
    layout = SequenceLayout("zigzag", world_size, 75)
    mask = AttentionMask(((0, 30, 31, 75), (0, 60)), causal=True)
    group = RankGroup(dist.group.WORLD)
    if seed is not None:
        group = Sleepy(dist.group.WORLD)
        group.random = random.Random(seed * 100 + rank)
    generator = torch.Generator().manual_seed(rank)
    shape = [(2, layout.local_length, heads, 16) for heads in (4, 2, 2, 4)]
    q, k, v, dout = (torch.randn(size, generator=generator).to(dtype) for size in shape)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = sequence_parallel_attention(*leaves, layout=layout, mask=mask, group=group, strategy=strategy)
    out.backward(dout)
    return [out.detach(), lse, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("name", NAMES)
def test_bit_for_bit_whenever_messages_arrive(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first, *others = (run_ranks(results, 4, Strategy(name), dtype, seed) for seed in (None, None, 1, 2))
        for other in others:
            for mine, its in zip(first, other, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def test_inputs_and_results_stay_as_they_are() -> None:
    """Partial results accumulate in place, but never in a tensor of the caller."""
    run_ranks(inputs_stay, 3)


def inputs_stay(rank: int, world_size: int) -> None:
    layout, mask = SequenceLayout("zigzag", world_size, 40), AttentionMask.dense(40)
    for name in NAMES:
        q, k, v = (torch.randn(1, layout.local_length, 2, 16, requires_grad=True) for _ in range(3))
        dout = torch.randn_like(q)
        before = [x.detach().clone() for x in (q, k, v, dout)]
        group = RankGroup(dist.group.WORLD)
        out, _ = sequence_parallel_attention(q, k, v, layout=layout, mask=mask, group=group, strategy=name)
        kept = out.detach().clone()
        out.backward(dout)
        assert all(torch.equal(x, y) for x, y in zip((q, k, v, dout, out), (*before, kept), strict=True)), name


class Silent(RankGroup):
    """One of two ranks, of which the other would wait for ever if this one sent anything."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    def exchange(self, sends, receives):
        raise AssertionError("sent something")


def attend(q=(1, 8, 4, 16), k=(1, 8, 2, 16), v=None, dtypes=(torch.float32,) * 3, **settings) -> None:
    tensors = [torch.zeros(size, dtype=dtype) for size, dtype in zip((q, k, v or k), dtypes, strict=True)]
    usual = {"layout": SequenceLayout("zigzag", 2, 16), "mask": AttentionMask.dense(16), "group": Silent()}
    sequence_parallel_attention(*tensors, **{**usual, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"q": (8, 4, 16)}, r"do not fit: \(8, 4, 16\)"),
        ({"v": (1, 8, 2, 32)}, "do not fit"),
        ({"q": (2, 8, 4, 16)}, "do not fit"),
        ({"q": (1, 4, 4, 16)}, "do not fit"),
        ({"q": (1, 8, 4, 32)}, "do not fit"),
        ({"k": (1, 8, 3, 16)}, "4 query heads are not a multiple of 3 key/value heads"),
        ({"dtypes": (torch.float32, torch.bfloat16, torch.float32)}, "one dtype"),
        ({"sinks": torch.zeros(2)}, r"one entry per query head, \[4\], got \(2,\)"),
        ({"layout": SequenceLayout("zigzag", 3, 16)}, "layout is for 3 ranks, the group has 2"),
        ({"layout": SequenceLayout("zigzag", 2, 20)}, "each rank holds 10 tokens"),
        ({"mask": AttentionMask(((0, 8), (0, 9)))}, "document borders for 2 rows, the batch has 1"),
        ({"mask": AttentionMask.dense(17)}, "documents reach to position 17, beyond the layout's 16"),
        ({"strategy": "flash"}, "unknown attention strategy 'flash'"),
        ({"strategy": Strategy("usp", ulysses=3)}, "2 ranks are not a multiple of ulysses=3"),
    ],
)
def test_misuse_is_refused_before_anything_is_sent(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(**settings)
