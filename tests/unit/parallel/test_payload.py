"""What travels: shapes, dtypes and bytes of every kind of item."""

from __future__ import annotations

import pytest
import torch

from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape, payload, sent_bytes
from lctrain.parallel.schedule import SUMS, Direction, TileMap
from lctrain.parallel.strategies import Problem, make_schedule

BF16 = AttentionShape(2, 8, 2, 64, torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "direction", "per_token"),
    [
        ("kv", "forward", 2 * (2 * 2 * 64 * 2)),
        ("q", "forward", 2 * (8 * 64 * 2)),
        ("out", "forward", 2 * (8 * 64 * 2 + 8 * 4)),  # lse in fp32
        ("q", "backward", 2 * (2 * 8 * 64 * 2 + 2 * 8 * 4)),  # q and dout; lse and delta in fp32
        ("dq", "backward", 2 * (8 * 64 * 4)),
        ("dkv", "backward", 2 * (2 * 2 * 64 * 4)),
    ],
)
def test_bytes_per_token(kind: str, direction: Direction, per_token: int) -> None:
    assert sum(part.bytes_per_token for part in payload(kind, direction, BF16, BF16.split(1), 0)) == per_token


@pytest.mark.parametrize("kind", ["kv", "q", "out", "dq", "dkv"])
def test_slices_of_the_heads_make_the_whole(kind: str) -> None:
    direction: Direction = "forward" if kind == "out" else "backward"

    def size(slices: int) -> int:
        split = BF16.split(slices)
        return sum(part.bytes_per_token for i in range(slices) for part in payload(kind, direction, BF16, split, i))

    assert size(2) == size(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_that_are_added_to_travel_in_accumulation_precision(dtype: torch.dtype) -> None:
    shape = AttentionShape(1, 4, 2, 16, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for kind in ("dq", "dkv"):
        assert {part.dtype for part in payload(kind, "backward", shape, shape.split(1), 0)} == {wide}
        assert {part.dtype for part in payload(kind, "backward", shape, shape.split(1), 0, rounded=(kind,))} == {dtype}
    assert {part.dtype for part in payload("kv", "backward", shape, shape.split(1), 0)} == {dtype}
    assert payload("out", "forward", shape, shape.split(1), 0)[1].dtype == wide


@pytest.mark.parametrize("world", [2, 4, 8])
def test_bytes_of_zigzag_causal_strategies(world: int) -> None:
    """The formulas of docs/attention.md, summed over ranks (T tokens per rank, all sizes per batch row)."""
    tokens, (b, h, k, heads) = 32, (2, 8 * 64, 2 * 64, 8)
    length = tokens * world
    live = TileMap(SequenceLayout("zigzag", world, length), AttentionMask.dense(length))
    shape = AttentionShape(1, heads, 2, 64, torch.bfloat16)
    wanted = {
        ("ring", "forward"): {"kv": 2 * k * b},
        ("ring", "backward"): {"kv": 2 * k * b, "dkv": 8 * k},
        ("all_gather", "forward"): {"kv": 2 * k * b},
        ("all_gather", "backward"): {"kv": 2 * k * b, "dkv": 2 * k * b},
        ("token_ring", "forward"): {"q": h * b, "out": h * b + 4 * heads},
        ("token_ring", "backward"): {"q": 2 * h * b + 8 * heads, "dq": 4 * h},
    }
    for (strategy, direction), kinds in wanted.items():
        schedule = make_schedule(strategy, Problem(live, direction, 2, 1))
        for kind, per_token in kinds.items():
            total = sum(sent_bytes(schedule, rank, shape, tokens // 2).get(kind, 0) for rank in range(world))
            assert total == 0.75 * world * (world - 1) * tokens * per_token, (strategy, direction, kind)
            assert kind not in SUMS or direction == ("forward" if kind == "out" else "backward")
