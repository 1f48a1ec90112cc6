"""What schedules for packed documents cost, and what is left of it in the training step: the table of docs/attention.md.

python tools/prepare_cost.py [RANKS [TOKENS]]        (default 64 and 131072)

For one micro-batch of one row with full and windowed attention layers, forward and backward, on one rank of that many: CPU time
of making and checking its plans, which the loader's threads do, and of finding them in the step once for each of LAYERS layers.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from lctrain.bench.mixes import MIXES, mixed_borders
from lctrain.parallel.attention import prepare_attention
from lctrain.parallel.deal import make_layout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.strategy import Strategy

LAYERS = 32
WINDOWS = (None, 4096)
"""Of the layers, by turns."""
HEADS = (32, 8)
SEEDS = range(5)
STRATEGIES = (Strategy("ring"), Strategy("token_ring"), Strategy("all_gather"), Strategy("usp", ulysses=8))


def times(strategy: Strategy, layout_kind: str, mix: str, world: int, length: int, seed: int) -> tuple[float, float]:
    """CPU seconds of making the plans, and of finding them again for every layer."""
    documents = (mixed_borders(mix, length, seed),)
    layout = make_layout(layout_kind, world, length, documents)

    def plans(window: int | None) -> tuple[object, ...]:
        return prepare_attention(layout, AttentionMask(documents, window=window), world // 3, strategy, *HEADS)

    began = time.thread_time()
    held = [plans(window) for window in WINDOWS]
    made = time.thread_time()
    found = [plans(WINDOWS[layer % len(WINDOWS)]) for layer in range(LAYERS)]
    ended = time.thread_time()
    assert all(a is b for one, other in zip(held, found, strict=False) for a, b in zip(one, other, strict=True))
    return made - began, ended - made


def _multiple_of_8(text: str) -> int:
    if not text.isdecimal() or int(text) < 8 or int(text) % 8:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 8")
    return int(text)


def main() -> None:
    """Print the table in Markdown: milliseconds, medians over SEEDS, in brackets the worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", type=_multiple_of_8, nargs="?", default=64, help="a multiple of 8, for usp's groups")
    parser.add_argument("tokens", type=int, nargs="?", default=131_072, help="at least one for each rank")
    asked = parser.parse_args()
    world, length = asked.ranks, asked.tokens
    if length < world:
        parser.error(f"tokens={length} is less than one for each of {world} ranks")
    torch.set_num_threads(1)
    print(f"| Documents ({length:,} tokens, {world} ranks) | layout | strategy | made by the loader | found in the step |")
    print("|---|---|---|---|---|")
    for mix in list(MIXES)[:4]:
        for kind in ("zigzag", "balanced"):
            for strategy in STRATEGIES:
                both = 1e3 * np.array([times(strategy, kind, mix, world, length, seed) for seed in SEEDS])
                cells = (f"{np.median(column):.3g} ms ({column.max():.3g})" for column in both.T)
                print(f"| {mix} | {kind} | {strategy.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
