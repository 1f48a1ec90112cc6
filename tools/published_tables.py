"""Published timings of sequence-parallel attention beside the simulator's: the tables of docs/benchmarks/simulate.md.

usage: python tools/published_tables.py
"""

from __future__ import annotations

import torch

from lctrain.attention_choice import preset
from lctrain.parallel.cost import costed_steps
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.simulator import Timeline, simulate
from lctrain.parallel.strategy import Strategy


def main() -> None:
    """Print both tables in Markdown."""
    token_ring()
    magi_attention()


def token_ring() -> None:
    """TokenRing (arXiv 2412.20501): forward, 4 A10 cards on PCIe, 24,000 tokens, 32 heads of 128."""
    cluster, mask = preset("a10_pcie").build(), AttentionMask.dense(24_000)
    layout, shape = SequenceLayout("zigzag", 4, 24_000), AttentionShape(1, 32, 32, 128, torch.bfloat16)
    ring = simulate(Strategy("ring"), layout, mask, shape, "forward", cluster)
    token = simulate(Strategy("token_ring"), layout, mask, shape, "forward", cluster)
    published = [
        ("ring, step 0", ring, 0, 7.6),
        *((f"token_ring, step {n}", token, n, t) for n, t in enumerate((3.5, 3.5, 4.6))),
    ]
    print("| Step | published, ms | simulated, ms | error |\n|---|---|---|---|")
    for name, timeline, step, milliseconds in published:
        mine = 1e3 * _step_seconds(timeline, step)
        print(f"| {name} | {milliseconds} | {mine:.1f} | {mine / milliseconds - 1:+.0%} |")


def magi_attention() -> None:
    """MagiAttention's chart: backward TFLOP/s per GPU on H100, 64 heads (8 KV) of 128, 8,192 tokens per GPU."""
    cluster, shape = preset("h100").build(), AttentionShape(1, 64, 8, 128, torch.bfloat16)
    print("\n| Method | GPUs | published | simulated | error |\n|---|---|---|---|---|")
    for strategy, name, published in (
        (Strategy("ulysses"), "Ulysses", (332, 294, 276, 248)),
        (Strategy("usp", 8), "USP (ulysses=8)", (325, 309, 284, 195)),
        (Strategy("ring"), "ring", (97, 86, 57, 29)),
    ):
        for world, tflops in zip((8, 16, 32, 64), published, strict=True):
            kind = "contiguous" if strategy.name == "ulysses" else "zigzag"  # Ulysses is even with any, and quicker to plan
            mask, layout = AttentionMask.dense(8192 * world), SequenceLayout(kind, world, 8192 * world)
            timeline = simulate(strategy, layout, mask, shape, "backward", cluster)
            steps = costed_steps(strategy, layout, mask, shape, "backward")
            flops = sum(step.flops("backward", shape.head_dim) for rank in steps for step in rank)
            mine = flops / timeline.seconds / world / 1e12
            print(f"| {name} | {world} | {tflops} | {mine:.0f} | {mine / tflops - 1:+.0%} |", flush=True)


def _step_seconds(timeline: Timeline, step: int) -> float:
    """From the first start of a step to the last rank's end of it."""
    spans = [(one.start, one.end) for one in (*timeline.computed, *timeline.waited) if one.step == step]
    return max(end for _, end in spans) - min(start for start, _ in spans)


if __name__ == "__main__":
    main()
