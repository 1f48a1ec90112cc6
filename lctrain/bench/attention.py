"""`lctrain bench attention`: strategies beside one process with SDPA, in turn, with their errors, bytes and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from statistics import median
from typing import Any

from lctrain.bench.attention_problem import Gradients, Pass, Problem, Timing
from lctrain.bench.attention_rank import run_rank
from lctrain.bench.attention_sdpa import WholeSequence
from lctrain.bench.attention_tables import print_bytes, print_passes
from lctrain.bench.child import Child
from lctrain.bench.published import published_bytes
from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.config.bench import AttentionBenchConfig
from lctrain.console import progress, say, warn
from lctrain.launch.ranks import RankPool
from lctrain.parallel.cost import costed_steps, traffic
from lctrain.parallel.schedule import Direction
from lctrain.parallel.strategy import Strategy

TIMEOUT_S = 3600.0
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


def bench_attention(config: AttentionBenchConfig) -> int:
    """Measure, print, store; returns 1 if a rank sent other bytes than its schedule says."""
    check_output(config)
    machine = introduce_machine()
    heads = f"{config.heads} heads and {config.kv_heads or config.heads} KV heads of {config.head_dim}"
    window = f", window {config.window}" if config.window else ""
    say(f"batch {config.batch}, {heads}, {config.dtype}, {config.layout}{window}, median of {config.repeats} passes\n")
    results = [result for seq in config.seq for result in _measure(config, Problem.of(config, seq))]
    print_passes(results)
    print_bytes(results)
    store(config, "attention", machine, results)
    wrong = [result for result in results if result.get("sent") != result.get("scheduled")]
    for result in wrong:
        warn(f"{result['strategy']} on {result['cp']} ranks sent other bytes than its schedule says")
    return int(bool(wrong))


def _measure(config: AttentionBenchConfig, problem: Problem) -> Iterator[dict[str, Any]]:
    """For every number of ranks a row for SDPA with as many threads (at most all cores), then one for each strategy."""
    strategies = [Strategy(name) for name in config.strategies]
    with Child(WholeSequence, len(os.sched_getaffinity(0)), problem) as yardstick:
        exact = yardstick.call("exact")
        for cp in config.cp:
            threads = min(cp, len(os.sched_getaffinity(0)))
            whole: list[list[Pass]] = []
            ranks: dict[Strategy, list[list[Pass]]] = {strategy: [] for strategy in strategies}
            total = (config.repeats + 1) * (1 + len(strategies))
            with closing(RankPool(cp)) as pool, progress(f"seq {problem.seq}, cp {cp}", total, "passes") as advance:
                for index in range(config.repeats + 1):
                    whole.append([yardstick.call("run", threads, index == 0)])
                    advance(1)
                    for strategy in strategies:
                        ranks[strategy].append(pool.run(run_rank, problem, strategy, index == 0, timeout_s=TIMEOUT_S))
                        advance(1)
            base = {"seq": problem.seq, "documents": len(problem.borders) - 1, "cp": cp}
            results = whole[0][0].results
            assert results is not None
            yield {**base, "strategy": "SDPA", "threads": threads, "error": _errors(results, exact), **_summary(whole)}
            for strategy, passes in ranks.items():
                error = _errors(_unsharded(problem, passes[0]), exact)
                yield {**base, "strategy": strategy.name, "threads": cp, "error": error, **_summary(passes)} | _bytes(
                    problem, strategy, passes[0]
                )


def _errors(results: Gradients, exact: Gradients) -> dict[str, float]:
    """Largest error of each tensor over its largest entry."""
    pairs = zip(results._fields, results, exact, strict=True)
    return {name: float((x.double() - y).abs().max() / y.abs().max()) for name, x, y in pairs}


def _unsharded(problem: Problem, ranks: list[Pass]) -> Gradients:
    shards = [rank.results for rank in ranks if rank.results is not None]
    return Gradients(*(problem.layout(len(ranks)).unshard(parts, dim=1) for parts in zip(*shards, strict=True)))


def _summary(passes: list[list[Pass]]) -> dict[str, Any]:
    """Medians and minima over all passes but the first, which pays for whatever happens only once."""
    timed = passes[1:]
    forward, backward = ([_together([getattr(rank, way) for rank in ranks]) for ranks in timed] for way in DIRECTIONS)
    both = [Timing(f.wall + b.wall, f.cpu + b.cpu) for f, b in zip(forward, backward, strict=True)]
    summary: dict[str, Any] = {"memory_mib": max(rank.memory_mib for ranks in timed for rank in ranks)}
    for what, timings in (("forward", forward), ("backward", backward), ("both", both)):
        for clock in Timing._fields:
            values = [getattr(timing, clock) for timing in timings]
            summary[f"{what}_{clock}_s"], summary[f"best_{what}_{clock}_s"] = median(values), min(values)
    return summary


def _together(ranks: list[Timing]) -> Timing:
    """Ranks that worked at the same time: the slowest one's wall time, everyone's CPU time."""
    return Timing(max(rank.wall for rank in ranks), sum(rank.cpu for rank in ranks))


def _bytes(problem: Problem, strategy: Strategy, ranks: list[Pass]) -> dict[str, Any]:
    """Bytes by direction, then by rank: counted at run time, by the schedule, and in the strategy's published form."""
    case = strategy, problem.layout(len(ranks)), problem.mask, problem.shape
    work = [sum(call.entries * call.heads for step in steps for call in step.calls) for steps in costed_steps(*case, "forward")]
    return {
        "imbalance": max(work) * len(work) / sum(work),
        "sent": {way: [_plain(rank.sent[way]) for rank in ranks] for way in DIRECTIONS},
        "scheduled": {way: [_plain(traffic(*case, way, rank)) for rank in range(len(ranks))] for way in DIRECTIONS},
        "published": {way: published_bytes(strategy, way, case[1], case[3]) for way in DIRECTIONS},
    }


def _plain(counted: Mapping[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in sorted(counted.items()) if count}
