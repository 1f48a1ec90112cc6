"""`lctrain bench simulate`: the simulator's times beside those measured on this machine, strategy by strategy."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from statistics import median
from typing import Any, NamedTuple

from lctrain.bench.attention_problem import Problem, Timing
from lctrain.bench.attention_rank import time_rank
from lctrain.bench.calibrate import Network, core_fraction, measure_device, measure_network, topology, with_exchanges
from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.config.simulate import SimulateBenchConfig
from lctrain.console import progress, say, table
from lctrain.launch.ranks import RankPool
from lctrain.parallel.cost import costed_steps
from lctrain.parallel.device import Device
from lctrain.parallel.schedule import Direction
from lctrain.parallel.simulator import Cluster, busy_seconds, layer_seconds
from lctrain.parallel.strategy import Strategy

TIMEOUT_S = 3600.0
DISTINCT = 0.15
"""Measured times that differ by more than this should be simulated in the right order."""
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


class Sample(NamedTuple):
    """One measured pass, forward and backward: share of the cores around it, wall seconds, CPU seconds of all ranks."""

    fraction: float
    wall: float
    cpu: float


def bench_simulate(config: SimulateBenchConfig) -> int:
    """Calibrate, measure, simulate, print, store."""
    check_output(config)
    machine = introduce_machine()
    shape = Problem.of(config, config.seq[0]).shape
    with closing(RankPool(2)) as pool:
        network = measure_network(pool)
    machines = dict[int, tuple[Device, Network]]()
    for cp in config.cp:
        with closing(RankPool(cp)) as pool, progress(f"attention kernel, {cp} ranks at once", 1) as advance:
            device = measure_device(pool, shape)
            machines[cp] = device, with_exchanges(network, pool, shape, device)
            advance(1)
    _print_machine(machines)
    results = [row for seq in config.seq for cp in config.cp for row in _measure(config, seq, cp, *machines[cp])]
    print_results(results)
    store(config, "simulate", machine, results)
    return 0


def _measure(config: SimulateBenchConfig, seq: int, cp: int, device: Device, network: Network) -> Iterator[dict[str, Any]]:
    problem, strategies = Problem.of(config, seq), [Strategy(name) for name in config.strategies]
    samples: dict[Strategy, list[Sample]] = {strategy: [] for strategy in strategies}
    total = (config.repeats + 1) * len(strategies)
    with closing(RankPool(cp)) as pool, progress(f"seq {seq}, cp {cp}", total, "passes") as advance:
        for turn in range(config.repeats + 1):
            before = core_fraction(pool)
            for strategy in strategies:
                ranks: list[tuple[Timing, Timing]] = pool.run(time_rank, problem, strategy, timeout_s=TIMEOUT_S)
                after = core_fraction(pool)
                wall = sum(max(timing.wall for timing in way) for way in zip(*ranks, strict=True))
                cpu = sum(timing.cpu for rank in ranks for timing in rank)
                if turn:  # the first pass pays for whatever happens only once
                    samples[strategy].append(Sample((before + after) / 2, wall, cpu))
                before = after
                advance(1)
    usual = median(sample.fraction for found in samples.values() for sample in found)
    for strategy, found in samples.items():
        row = _compare(problem, cp, strategy, found, usual, device, network)
        yield {"seq": seq, "cp": cp, "strategy": strategy.name, **row}


def _compare(
    problem: Problem, cp: int, strategy: Strategy, samples: Sequence[Sample], usual: float, device: Device, network: Network
) -> dict[str, Any]:
    """Medians over passes, each simulated with the share of the cores that there was around it; for the order of strategies,
    every single pass and a simulation with the `usual` share."""
    case = strategy, problem.layout(cp), problem.mask, problem.shape
    cores = len(os.sched_getaffinity(0))
    *clusters, usually = (
        Cluster("this machine", device, topology(network, cores * fraction))
        for fraction in (*(sample.fraction for sample in samples), usual)
    )
    simulated = [layer_seconds(*case, cluster) for cluster in clusters]
    ways = [(costed_steps(*case, way), way) for way in DIRECTIONS]
    busy = sum(sum(map(sum, busy_seconds(steps, problem.layout(cp), problem.shape, way, usually))) for steps, way in ways)
    sent = sum(send.bytes for steps, _ in ways for rank in steps for step in rank for send in step.sends)
    cpu = busy + 2 * network.cpu_s_per_byte * sent
    measured_cpu = median(sample.cpu for sample in samples)
    return {
        "core_fraction": median(sample.fraction for sample in samples),
        "simulated_s": median(simulated),
        "measured_s": median(sample.wall for sample in samples),
        "error": median(mine / sample.wall - 1 for mine, sample in zip(simulated, samples, strict=True)),
        "simulated_cpu_s": cpu,
        "measured_cpu_s": measured_cpu,
        "cpu_error": cpu / measured_cpu - 1,
        "simulated_alike_s": layer_seconds(*case, usually),
        "passes_s": [sample.wall for sample in samples],
    }


def _print_machine(machines: dict[int, tuple[Device, Network]]) -> None:
    device, network = next(iter(machines.values()))
    sizes = device.forward.rows
    rows = []
    for cp, (device, _) in machines.items():
        for way in DIRECTIONS:
            full, causal = getattr(device, way), getattr(device, f"causal_{way}")
            rates = [*(full.flops[i][i] for i in range(len(sizes))), *(line[0] for line in causal.flops)]
            rows.append((cp, way, *(f"{rate / 1e9:.0f}" for rate in rates)))
    columns = ("ranks", "kernel", *(f"{kind} {size}" for kind in ("full", "causal") for size in sizes))
    table(columns, rows, title="GFLOP/s of a core, by CPU time, all ranks at once", align="rl" + "r" * 2 * len(sizes))
    say(
        f"gloo: {network.one_way / 1e9:.2f} GB/s one way, {network.two_way / 1e9:.2f} per direction both ways,"
        f" {network.latency * 1e6:.0f} us, {network.cpu_s_per_byte * 1e9:.2f} core-seconds per GB at each end"
    )
    for cp, (device, network) in machines.items():
        times = (device.call_s, device.pass_s, network.cpu_s_per_message, network.cpu_s_per_exchange)
        call, one_pass, message, exchange = (f"{seconds * 1e6:.0f}" for seconds in times)
        per_byte = f"{device.pass_s_per_byte * 1e9:.1f} s per GB of queries"
        say(f"{cp} ranks: a call takes {call} us besides, a pass {one_pass} and {per_byte};")
        say(f"         a rank takes {exchange} us for what it posts together, and {message} for each tensor of it")
    say("")


def print_results(results: Sequence[dict[str, Any]]) -> None:
    """Every strategy's times and errors, then what they come to."""
    rows = [
        (
            row["seq"],
            row["cp"],
            row["strategy"],
            f"{row['core_fraction']:.0%}",
            *(f"{row[f'{what}_s']:.3f}" for what in ("simulated", "measured")),
            f"{row['error']:+.0%}",
            *(f"{row[f'{what}_cpu_s']:.3f}" for what in ("simulated", "measured")),
            f"{row['cpu_error']:+.0%}",
        )
        for row in results
    ]
    columns = ("seq", "ranks", "strategy", "cores", "simulated", "measured", "error", "CPU simulated", "measured", "error")
    table(columns, rows, align="rrlrrrrrrr")
    say("seconds of forward and backward, medians, as is the error of single passes; cores: share that other programs left us;")
    say("CPU: all ranks together")
    say(f"median error {median(abs(row['error']) for row in results):.0%} of wall time,", style="bold")
    say(f"             {median(abs(row['cpu_error']) for row in results):.0%} of CPU time")
    right, distinct = order_of(results)
    say(f"pairs of strategies whose measured times differ by more than {DISTINCT:.0%}: {distinct}, in the right order: {right}")


def order_of(results: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """(pairs simulated in the order in which they were measured, pairs measured to differ by more than DISTINCT).

    Passes of a pair are compared turn by turn, so that what other programs do meanwhile concerns both.
    """
    right = distinct = 0
    for one, two in itertools.combinations(results, 2):
        if (one["seq"], one["cp"]) != (two["seq"], two["cp"]):
            continue
        ratio = median(a / b for a, b in zip(one["passes_s"], two["passes_s"], strict=True))
        if max(ratio, 1 / ratio) > 1 + DISTINCT:
            distinct += 1
            right += (ratio > 1) == (one["simulated_alike_s"] > two["simulated_alike_s"])
    return right, distinct
