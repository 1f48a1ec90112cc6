"""How even layouts are on mixes of document lengths, and what they make ranks receive: the table of docs/layouts.md.

python tools/layout_balance.py [TOKENS]        (default 131072)
"""

from __future__ import annotations

import sys
import time

import numpy as np

from lctrain.bench.mixes import MIXES, mixed_borders
from lctrain.parallel.balance import imbalance
from lctrain.parallel.deal import make_layout
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.live import live_pairs
from lctrain.parallel.mask import AttentionMask

SEEDS = range(10)
KINDS = ("contiguous", "zigzag", "striped", "balanced")


def received(layout: SequenceLayout, mask: AttentionMask) -> float:
    """Chunks of keys and values that a rank receives in one forward pass, mean over ranks, in shares of its own tokens."""
    world, chunks = layout.world_size, layout.chunks
    live = live_pairs([segment for rank in range(world) for segment in layout.segments(rank)], mask)
    needed = live.reshape(world, chunks, world, chunks).any(axis=1)  # rank x owner x chunk
    needed[np.arange(world), np.arange(world)] = False
    return float(needed.sum() / (world * chunks))


def main() -> None:
    """Print the table in Markdown: imbalance, mean and (worst) over SEEDS · keys received; blocks per rank of balanced."""
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 131_072
    print(f"| Documents ({length:,} tokens) | Ranks | " + " | ".join(KINDS) + " | blocks | dealt in |")
    print("|---|---|" + "---|" * (len(KINDS) + 2))
    for mix in MIXES:
        for world in (2, 4, 8, 16, 64):
            cells, blocks, dealt = [], list[int](), list[float]()
            for kind in KINDS:
                uneven, keys = [], []
                for seed in SEEDS:
                    mask = AttentionMask((mixed_borders(mix, length, seed),))
                    began = time.perf_counter()
                    layout = make_layout(kind, world, length, mask.documents)
                    if kind == "balanced":
                        dealt.append(time.perf_counter() - began)
                        blocks.append(layout.chunks)
                    uneven.append(imbalance(layout, mask))
                    keys.append(received(layout, mask))
                cells.append(f"{np.mean(uneven):.2f} ({max(uneven):.2f}) · {np.mean(keys):.1f}")
            print(
                f"| {mix} | {world} | "
                + " | ".join(cells)
                + f" | {min(blocks)} to {max(blocks)} | {np.median(dealt) * 1e3:.1f} ms |"
            )


if __name__ == "__main__":
    main()
