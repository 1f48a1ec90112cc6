"""Cost: bytes and tensors are those that ranks really send, work is the mask's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.cost import costed_steps, traffic
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import KINDS, SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.strategies import STRATEGIES
from lctrain.parallel.strategy import NAMES, Strategy

HEADS = ((4, 4), (4, 2), (4, 1), (3, 3), (6, 2), (2, 2), (8, 1))


@pytest.fixture(scope="module", autouse=True)
def _end_ranks() -> Iterator[None]:
    yield
    close_pools()


def random_case(draw: random.Random, name: str, world: int):
    """A strategy with degrees, a layout, a mask and a shape."""
    length = draw.choice([1, 7, 64, draw.randint(1, 200)])
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    strategy = Strategy(
        name,
        ulysses=draw.choice([None, *divisors]),
        ring=draw.choice(list(STRATEGIES)),
        nesting=draw.choice(["inner", "outer"]),
        node=draw.choice([None, *divisors]),
    )
    batch, heads = draw.choice([1, 2]), draw.choice(HEADS)
    rows = tuple((0, *sorted({draw.randint(1, length) for _ in range(draw.randint(1, 6))})) for _ in range(batch))
    mask = AttentionMask(rows, draw.random() < 0.7, draw.choice([None, None, 1, 3, 40]))
    shape = AttentionShape(batch, *heads, 8, draw.choice([torch.float32, torch.bfloat16, torch.float64]))
    return strategy, SequenceLayout(draw.choice(KINDS), world, length), mask, shape


def send_and_count(rank: int, world_size: int, name: str, cases: int) -> None:
    draw = random.Random(f"{name} {world_size}")
    tensors, start = [], dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        tensors.extend(one.tensor for one in operations if one.op is dist.isend)
        return start(operations)

    dist.batch_isend_irecv = counted
    try:
        _compare_counts(rank, world_size, name, cases, draw, tensors)
    finally:
        dist.batch_isend_irecv = start


def _compare_counts(
    rank: int, world_size: int, name: str, cases: int, draw: random.Random, tensors: list[torch.Tensor]
) -> None:
    for _ in range(cases):
        case = strategy, layout, mask, shape = random_case(draw, name, world_size)
        sizes = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
        q, k, v = (
            torch.ones(shape.batch, layout.local_length, n, shape.head_dim, dtype=shape.dtype, requires_grad=True)
            for n in sizes
        )
        tensors.clear()
        group = RankGroup(dist.group.WORLD if world_size > 1 else None)
        out, _ = sequence_parallel_attention(q, k, v, layout=layout, mask=mask, group=group, strategy=strategy, need_lse=False)
        forward = Counter(group.sent)
        out.backward(torch.ones_like(out))
        assert forward == traffic(*case, "forward", rank), case
        assert group.sent - forward == traffic(*case, "backward", rank), case
        steps = (step for way in ("forward", "backward") for step in costed_steps(*case, way)[rank])
        assert len(tensors) == sum(send.tensors for step in steps for send in step.sends), case


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_bytes_and_tensors_are_those_that_were_sent(name: str, world_size: int) -> None:
    run_ranks(send_and_count, world_size, name, 8)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(NAMES), world=st.integers(1, 8))
def test_work_is_the_masks(seed: int, name: str, world: int) -> None:
    strategy, layout, mask, shape = random_case(random.Random(seed), name, world)
    for direction, products in (("forward", 2), ("backward", 5)):
        ranks = costed_steps(strategy, layout, mask, shape, direction)
        assert len(ranks) == world
        assert len({len(steps) for steps in ranks}) == 1
        flops = sum(step.flops(direction, shape.head_dim) for steps in ranks for step in steps)
        assert flops == 2 * products * shape.head_dim * shape.n_heads * mask.total_entries(layout.length)
        for rank, steps in enumerate(ranks):
            for index, step in enumerate(steps):
                assert all(send.peer != rank and send.bytes > 0 and index <= send.until < len(steps) for send in step.sends)


def test_ulysses_with_few_kv_heads_sends_each_only_where_it_is_read() -> None:
    """One KV head on four ranks goes to three others; four KV heads go to one rank each."""
    layout, mask = SequenceLayout("zigzag", 4, 64), AttentionMask.dense(64)
    chunk = 16 * 8 * 4  # tokens of a rank, head size, bytes
    for kv_heads, copies in ((1, 3), (2, 3), (4, 3)):
        shape = AttentionShape(1, 4, kv_heads, 8, torch.float32)
        sent = traffic(Strategy("ulysses"), layout, mask, shape, "forward", 0)
        assert sent == {"q": 3 * chunk, "kv": 2 * copies * chunk, "out": 3 * chunk}
