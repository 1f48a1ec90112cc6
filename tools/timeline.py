"""Draw when the ranks of a sequence compute, send, receive and wait: simulated on a cluster, or measured on this machine.

usage: python tools/timeline.py [strategy=token_ring] [cp=4] [seq=32768] [cluster=h200] [output=timeline.png,trace.json]

  python tools/timeline.py strategy=token_ring cluster=a10_pcie seq=24000
  python tools/timeline.py strategy=usp cp=16 cluster=h200 output=usp.svg,usp.json
  python tools/timeline.py strategy=ring cp=2 seq=4096 heads=8 head_dim=64 dtype=fp32        (no cluster: measured here)
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from lctrain.bench.attention_problem import Problem
from lctrain.config.arguments import HelpRequested
from lctrain.config.load import load
from lctrain.config.timeline import TimelineConfig
from lctrain.console import say
from lctrain.devices import DTYPES
from lctrain.errors import UserError
from lctrain.launch.ranks import RankPool
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.simulator import simulate
from lctrain.parallel.strategy import Strategy
from lctrain.timeline.bars import Phase, simulated
from lctrain.timeline.draw import draw_timeline
from lctrain.timeline.record import record
from lctrain.timeline.trace import chrome_trace
from lctrain.whole_file import write_json


def phases_of(config: TimelineConfig) -> list[Phase]:
    """Forward and backward of one attention layer; UserError where degrees and ranks do not fit."""
    strategy = Strategy(config.strategy, config.ulysses, config.ring, config.nesting, config.node_size)
    shape = AttentionShape(config.batch, config.heads, config.kv_heads or config.heads, config.head_dim, DTYPES[config.dtype])
    problem = Problem(shape, config.seq, (0, config.seq), config.window, config.layout, seed=0)
    try:
        if config.cluster is None:
            with closing(RankPool(config.cp)) as pool:
                return record(pool, problem, strategy)
        layout, cluster = problem.layout(config.cp), config.cluster.build()
        return [
            simulated("forward", simulate(strategy, layout, problem.mask, shape, "forward", cluster)),
            simulated("backward", simulate(strategy, layout, problem.mask, shape, "backward", cluster)),
        ]
    except ValueError as error:
        raise UserError(str(error)) from None


def title_of(config: TimelineConfig) -> str:
    """What the picture shows, in one line."""
    kv_heads = config.kv_heads or config.heads
    heads = f"{config.heads} heads" if kv_heads == config.heads else f"{config.heads} heads ({kv_heads} KV)"
    window = f", window {config.window:,}" if config.window else ""
    where = f"simulated on {config.cluster.name}" if config.cluster else "measured on this machine"
    return (
        f"{config.strategy}, {config.cp} ranks, {config.seq:,} tokens, {heads} of {config.head_dim}, {config.layout}{window};"
        f" {where}"
    )


def main(args: list[str]) -> int:
    """Write the files that were asked for."""
    try:
        config = load(TimelineConfig, "timeline", args)
        phases, title = phases_of(config), title_of(config)
        for path in map(Path, config.output):
            if not path.parent.is_dir():
                raise UserError(f"output={path}: there is no folder {path.parent}")
            if path.suffix == ".json":
                write_json(path, chrome_trace(title, phases))
            else:
                draw_timeline(title, phases).savefig(path)
            say(str(path))
    except HelpRequested:
        say(__doc__ or "")
    except UserError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
