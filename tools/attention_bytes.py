"""The table of docs/attention.md: bytes that a rank sends for one attention layer, by strategy.

usage: python tools/attention_bytes.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lctrain.bench.published import published_bytes
from lctrain.parallel.cost import traffic
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.strategy import Strategy

TOKENS, HEADS, HEAD_DIM = 8192, 8, 64
SHAPES = {"MHA": HEADS, "GQA 4:1": HEADS // 4}
STRATEGIES = {
    "ring": Strategy("ring"),
    "bidirectional_ring": Strategy("bidirectional_ring"),
    "double_ring, 2 per node": Strategy("double_ring", node=2),
    "all_gather": Strategy("all_gather"),
    "token_ring": Strategy("token_ring"),
    "ulysses": Strategy("ulysses"),
    "usp, ulysses=2": Strategy("usp", ulysses=2),
}


def main() -> None:
    """Print the table as Markdown."""
    columns = [f"{heads} {way}" for heads in SHAPES for way in ("forward", "backward")]
    print(f"| N | strategy | {' | '.join(columns)} |")
    print("|---|---|" + "---|" * len(columns))
    for world in (4, 8):
        for name, strategy in STRATEGIES.items():
            print(f"| {world} | {name} | {' | '.join(_cells(strategy, world))} |")


def _cells(strategy: Strategy, world: int) -> Iterator[str]:
    layout, mask = SequenceLayout("zigzag", world, TOKENS), AttentionMask.dense(TOKENS)
    for kv_heads in SHAPES.values():
        shape = AttentionShape(1, HEADS, kv_heads, HEAD_DIM, torch.bfloat16)
        for way in ("forward", "backward"):
            ranks = [sum(traffic(strategy, layout, mask, shape, way, rank).values()) for rank in range(world)]
            mean, most, published = sum(ranks) / world, max(ranks), published_bytes(strategy, way, layout, shape)
            busiest = "" if most == mean else f" ({_mib(most)})"
            yield f"{_mib(mean)}{busiest}" + ("" if published in (None, mean) else f" / {_mib(published)}")


def _mib(count: float) -> str:
    return f"{count / 2**20:.3g}"


if __name__ == "__main__":
    main()
