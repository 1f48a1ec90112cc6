"""`lctrain bench attention --peers`: other libraries' sequence-parallel attention and ours, one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

from lctrain.bench.attention_problem import Gradients, Pass, Problem
from lctrain.bench.attention_rank import run_rank
from lctrain.bench.attention_results import DIRECTIONS, errors, summary, unsharded
from lctrain.bench.attention_sdpa import WholeSequence
from lctrain.bench.child import Child
from lctrain.bench.peers.peer import Peer
from lctrain.bench.peers.rank import run_peer
from lctrain.bench.peers.registry import PEERS
from lctrain.bench.peers.tables import print_bars, print_contenders
from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.config.bench import PeersBenchConfig
from lctrain.console import progress, say, warn
from lctrain.launch.ranks import RankError, RankPool
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.strategy import Strategy

TIMEOUT_S = 600.0
EXACT = 2e-6
"""Largest error of an exact contender over a tensor's largest entry; or TIMES_OWN times what SDPA in one process errs by."""
TIMES_OWN = 2.0


def bench_peers(config: PeersBenchConfig) -> int:
    """Measure, print, store; returns 1 if one of ours fails or is not exact."""
    check_output(config)
    machine = introduce_machine()
    for name in config.peers:
        if missing := PEERS[name].missing:
            say(f"{PEERS[name].name}: not installed ({missing} is missing): {PEERS[name].install}")
    results = []
    for settings in config.problems():
        problem = Problem.of(settings, settings.seq[0])
        base = {"seq": problem.seq, "heads": settings.heads, "kv_heads": settings.kv_heads, "dtype": settings.dtype}
        title = f"{problem.seq} tokens, {settings.heads} heads, {settings.kv_heads} KV heads, {settings.dtype}"
        for rows in _measure(config, problem):
            results += (found := [{**base, **row} for row in rows])
            print_contenders(title, found)
    print_bars(results)
    store(config, "attention, peers", machine, results)
    wrong = [row for row in results if row["ours"] and not row.get("exact")]
    for row in wrong:
        warn(f"{row['contender']} on {row['cp']} ranks is not exact: {row.get('error') or row['why_not']}")
    return int(bool(wrong))


def _measure(config: PeersBenchConfig, problem: Problem) -> Iterator[list[dict[str, Any]]]:
    """For every number of ranks a row for SDPA in one process and one for each contender."""
    with Child(WholeSequence, len(os.sched_getaffinity(0)), problem) as yardstick:
        exact = yardstick.call("exact")
        for cp in config.cp:
            threads = min(cp, len(os.sched_getaffinity(0)))
            whole: list[list[Pass]] = [[yardstick.call("run", threads, True)]]
            assert whole[0][0].results is not None
            own = errors(whole[0][0].results, exact)
            bars = {name: max(EXACT, TIMES_OWN * (error or 0.0)) for name, error in own.items()}
            rows = []
            contenders = list(_contenders(config, problem, cp))
            with progress(f"{problem.seq} tokens on {cp} ranks", len(contenders), "contenders") as advance:
                for row, layout, run in contenders:
                    whole.append([yardstick.call("run", threads, False)])  # in between: the machine's speed may drift
                    rows.append(row | ({} if layout is None else _passes(config.repeats, cp, layout, run, exact, bars)))
                    advance(1)
            sdpa = {"contender": "SDPA", "family": None, "ours": False, "cp": cp, "threads": threads, "kernel": "SDPA"}
            yield [{**sdpa, "error": own, "exact": True, "sent": None, **summary(whole)}, *rows]


Run = Callable[[RankPool, bool], list[Pass]]


def _contenders(
    config: PeersBenchConfig, problem: Problem, cp: int
) -> Iterator[tuple[dict[str, Any], SequenceLayout | None, Run]]:
    """(what is known of it, its layout or None if it cannot take part, how to run it), ours beside peers of the family."""
    families = {name: [PEERS[peer] for peer in config.peers if PEERS[peer].family == name] for name in _families(config)}
    for family, peers in families.items():
        for peer in peers:
            base = {"contender": peer.name, "family": family, "ours": False, "cp": cp, "threads": cp, "kernel": peer.kernel}
            missing, reason = peer.missing, peer.refuses(problem, cp)
            if missing or reason:
                why = f"not installed ({missing} is missing)" if missing else f"cannot: {reason}"
                yield {**base, "why_not": why}, None, _nothing
            else:
                yield base, peer.layout(cp, problem.seq), _of_peer(peer, problem)
        if family in config.strategies:
            base = {"contender": f"lctrain {family}", "family": family, "ours": True, "cp": cp, "threads": cp, "kernel": "ours"}
            yield base, problem.layout(cp), _of_strategy(Strategy(family), problem)


def _families(config: PeersBenchConfig) -> list[str]:
    return list(dict.fromkeys([*(PEERS[name].family for name in config.peers), *config.strategies]))


def _of_peer(peer: Peer, problem: Problem) -> Run:
    name = next(name for name, known in PEERS.items() if known is peer)
    return lambda pool, first: pool.run(run_peer, problem, name, first, timeout_s=TIMEOUT_S)


def _of_strategy(strategy: Strategy, problem: Problem) -> Run:
    return lambda pool, first: pool.run(run_rank, problem, strategy, first, timeout_s=TIMEOUT_S)


def _nothing(pool: RankPool, first: bool) -> list[Pass]:
    return []


def _passes(
    repeats: int, cp: int, layout: SequenceLayout, run: Run, exact: Gradients, bars: dict[str, float]
) -> dict[str, Any]:
    """Processes of its own for every contender: libraries leave groups, threads and patches behind."""
    pool = RankPool(cp)
    with closing(pool):
        try:
            passes = [run(pool, index == 0) for index in range(repeats + 1)]
        except RankError as failure:
            return {"why_not": f"fails: {str(failure).strip().splitlines()[-1]}"}
    error = errors(unsharded(layout, passes[0]), exact)
    sent = {way: [sum(rank.sent[way].values()) for rank in passes[0]] for way in DIRECTIONS}
    return {
        "error": error,
        "exact": all(found is not None and found <= bars[name] for name, found in error.items()),
        "sent": sent,
        **summary(passes),
    }
