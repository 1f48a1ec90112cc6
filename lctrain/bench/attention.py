"""`lctrain bench attention`: strategies beside one process with SDPA, in turn, with their errors, bytes and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from lctrain.bench.attention_problem import Pass, Problem
from lctrain.bench.attention_rank import run_rank
from lctrain.bench.attention_results import DIRECTIONS, errors, plain, summary, unsharded
from lctrain.bench.attention_sdpa import WholeSequence
from lctrain.bench.attention_tables import print_bytes, print_passes
from lctrain.bench.child import Child
from lctrain.bench.published import published_bytes
from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.config.bench import AttentionBenchConfig
from lctrain.console import progress, say, warn
from lctrain.launch.ranks import RankPool
from lctrain.parallel.cost import costed_steps, traffic
from lctrain.parallel.strategy import Strategy

TIMEOUT_S = 3600.0


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
            yield {**base, "strategy": "SDPA", "threads": threads, "error": errors(results, exact), **summary(whole)}
            for strategy, passes in ranks.items():
                error = errors(unsharded(problem.layout(cp), passes[0]), exact)
                yield {**base, "strategy": strategy.name, "threads": cp, "error": error, **summary(passes)} | _bytes(
                    problem, strategy, passes[0]
                )


def _bytes(problem: Problem, strategy: Strategy, ranks: list[Pass]) -> dict[str, Any]:
    """Bytes by direction, then by rank: counted at run time, by the schedule, and in the strategy's published form."""
    case = strategy, problem.layout(len(ranks)), problem.mask, problem.shape
    work = [sum(call.entries * call.heads for step in steps for call in step.calls) for steps in costed_steps(*case, "forward")]
    return {
        "imbalance": max(work) * len(work) / sum(work),
        "sent": {way: [plain(rank.sent[way]) for rank in ranks] for way in DIRECTIONS},
        "scheduled": {way: [plain(traffic(*case, way, rank)) for rank in range(len(ranks))] for way in DIRECTIONS},
        "published": {way: published_bytes(strategy, way, case[1], case[3]) for way in DIRECTIONS},
    }
