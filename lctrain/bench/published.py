"""Bytes that the published forms of strategies send, which know neither masks nor who still needs what.

Every token of every rank counts, and the same for all ranks:
  ring        Liu et al. 2023, as in ring-flash-attention; also split by heads or between nodes
  all_gather  Llama 3, torch context parallel
  ulysses     Jacobs et al. 2023, DeepSpeed; with more ranks than KV heads these are repeated
  usp         Fang and Zhao 2024, yunchang: Ulysses over U ranks, a ring over the N/U groups
TokenRing's paper gives no formula and no backward.
"""

from __future__ import annotations

from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.schedule import Direction
from lctrain.parallel.strategy import Strategy

RINGS = ("ring", "bidirectional_ring", "double_ring")
GRADIENT_BYTES = 4
"""Rings add up dk and dv in fp32."""


def published_bytes(strategy: Strategy, direction: Direction, layout: SequenceLayout, shape: AttentionShape) -> int | None:
    """Bytes that each rank sends for one attention layer; None where nothing is published."""
    world, tokens, size = layout.world_size, layout.local_length, shape.dtype.itemsize
    q, kv = (shape.batch * heads * shape.head_dim for heads in (shape.n_heads, shape.n_kv_heads))  # entries per token
    backward = direction == "backward"
    if strategy.name in RINGS:
        return _ring(world, tokens, kv, size, backward)
    if strategy.name == "all_gather":
        return (4 if backward else 2) * kv * size * (world - 1) * tokens
    if strategy.name in ("ulysses", "usp") and strategy.ring in RINGS:
        group = strategy.group_size(world, shape.n_kv_heads)
        repeated = kv * -(-group // shape.n_kv_heads)
        exchanged = (2 * q + 2 * repeated) * size * tokens * (group - 1) // group
        return exchanged + _ring(world // group, group * tokens, repeated // group, size, backward)
    return None


def _ring(world: int, tokens: int, kv: int, size: int, backward: bool) -> int:
    if world == 1:
        return 0
    keys = 2 * kv * size * (world - 1) * tokens
    return keys + 2 * kv * GRADIENT_BYTES * world * tokens if backward else keys
