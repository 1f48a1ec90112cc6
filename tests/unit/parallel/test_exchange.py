"""Heads for sequence and back, and groups of ranks that act as one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from lctrain.launch.ranks import close_pools, run_ranks
from lctrain.parallel.exchange import Grouped, HeadExchange
from lctrain.parallel.group import RankGroup
from lctrain.parallel.heads import split_heads
from lctrain.parallel.layout import KINDS, SequenceLayout


@pytest.fixture(scope="module", autouse=True)
def _end_ranks() -> Iterator[None]:
    yield
    close_pools()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1, 2, 3),), ((0,), (1,), (2,), (3,))])
def test_a_group_holds_its_members_tokens_by_rising_position(kind: str, groups) -> None:
    layout = SequenceLayout(kind, 4, 50)
    grouped = Grouped(layout, groups)
    assert grouped.local_length * grouped.world_size == layout.padded_length
    for index, members in enumerate(groups):
        segments = grouped.segments(index)
        assert [s.start for s in segments] == sorted(s.start for s in segments)
        assert [s.local for s in segments] == [place * grouped.chunk_length for place in range(grouped.chunks)]
        starts = {layout.segments(rank)[part].start for rank in members for part in range(layout.chunks)}
        assert {s.start for s in segments} == starts
        for (member, part), place in grouped.places(index).items():
            assert segments[place].start == layout.segments(members[member])[part].start


def exchange_there_and_back(rank: int, world_size: int, kind: str, heads: int, kv_heads: int) -> None:
    """Every tensor tells its global position and head, so that any mistake shows."""
    layout = SequenceLayout(kind, world_size, 21)
    grouped = Grouped(layout, (tuple(range(world_size)),))
    split = split_heads(heads, kv_heads, world_size)
    exchange = HeadExchange(RankGroup(dist.group.WORLD if world_size > 1 else None), grouped, 0, split)

    def named(positions: torch.Tensor, first: int, end: int) -> torch.Tensor:
        return (positions[:, None] * 100 + torch.arange(first, end)).expand(2, -1, -1)[..., None].double()

    mine = named(layout.indices(rank), 0, heads), named(layout.indices(rank), 0, kv_heads)
    q, kv = exchange.to_heads([("q", mine[0], split.q), ("kv", mine[1], split.kv)])
    step = grouped.segments(0)[0].step
    everywhere = torch.cat([s.start + step * torch.arange(grouped.chunk_length) for s in grouped.segments(0)])
    assert torch.equal(q, named(everywhere, *split.q[rank]))
    assert torch.equal(kv, named(everywhere, *split.kv[rank]))
    back_q, back_kv = exchange.to_tokens([("dq", q, split.q), ("dkv", kv, split.kv)])
    copies = torch.zeros(kv_heads).double()
    for first, end in split.kv:
        copies[first:end] += 1
    assert torch.equal(back_q, mine[0])
    assert torch.equal(back_kv, mine[1] * copies[:, None]), "what several slices give for a head is added up"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_there_and_back(world_size: int) -> None:
    for kind in KINDS:
        for heads, kv_heads in ((4, 4), (4, 2), (4, 1), (3, 3), (2, 2), (6, 2)):
            run_ranks(exchange_there_and_back, world_size, kind, heads, kv_heads)
