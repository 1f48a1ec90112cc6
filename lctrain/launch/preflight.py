"""Measure the nodes of a job before its first step, so that a slow or broken one is named instead of suffered."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lctrain.config.launcher import PreflightConfig
from lctrain.console import say, table
from lctrain.launch.preflight_judge import Measurement, Verdict, judge, verdict_of
from lctrain.run_dir import RunDir
from lctrain.tracking.jsonl import append_event

GEMM_S = 0.4
"""Time for matrix products on each device."""


def preflight(settings: PreflightConfig, node: int, nodes: list[str], address: str, port: int, run_dir: Path) -> Verdict | None:
    """Measure all nodes, one process on each calling this; node 0 prints what it found and returns the verdict.

    node: this one's place in `nodes`. address, port: where node 0 can be reached; the port must be free there.
    A node that does not answer within settings.timeout_s is taken to be broken.
    """
    patience = timedelta(seconds=settings.timeout_s)
    store = dist.TCPStore(address, port, is_master=node == 0, wait_for_workers=False, timeout=patience)
    mine = _measure_alone(nodes[node], run_dir)
    store.set(f"alone/{node}", json.dumps(dataclasses.asdict(mine)))
    if node == 0:
        here = _wait_for(store, len(nodes), settings.timeout_s)
        store.set("complete", str(len(here) == len(nodes)))
    else:
        here = {}
    missing: list[str] = []
    if store.get("complete") == b"True":
        measured = _measure_together(store, mine, node, len(nodes), patience)
    else:
        measured = list(here.values())
        missing = [name for number, name in enumerate(nodes) if number not in here]
    if node > 0:
        return None
    verdict = verdict_of(judge(measured, missing, settings), settings)
    _report(measured, verdict, RunDir(run_dir))
    return verdict


def _wait_for(store: dist.Store, count: int, patience_s: float) -> dict[int, Measurement]:
    """What the nodes that answer in time have measured alone."""
    here: dict[int, Measurement] = {}
    deadline = time.monotonic() + patience_s
    while len(here) < count and time.monotonic() < deadline:
        for number in range(count):
            if number not in here and store.check([f"alone/{number}"]):
                here[number] = Measurement(**json.loads(store.get(f"alone/{number}")))
        time.sleep(0.05)
    return here


def _measure_alone(name: str, run_dir: Path) -> Measurement:
    import psutil

    place = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "gpus": str(gpus)}
    if gpus:
        versions["gpu"] = torch.cuda.get_device_name(0)
        rates = [_gemm_rate(torch.device("cuda", index), 8192, torch.bfloat16) for index in range(gpus)]
    else:
        rates = [_gemm_rate(torch.device("cpu"), 512, torch.float32)]
    return Measurement(
        node=name,
        versions=versions,
        memory_gb=psutil.virtual_memory().available / 1e9,
        disk_gb=shutil.disk_usage(place).free / 1e9,
        gemm_gflops=min(rates),
    )


def _gemm_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of several products of square matrices; the fastest, as other work only ever slows one down."""
    a, b = (torch.full((size, size), 0.5, dtype=dtype, device=device) for _ in range(2))
    wait: Callable[[], object] = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    a @ b
    wait()
    best, end = float("inf"), time.perf_counter() + GEMM_S
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ b
        wait()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


def _measure_together(store: dist.Store, mine: Measurement, node: int, count: int, patience: timedelta) -> list[Measurement]:
    """Everybody's measurement, completed by what takes two: clocks and network."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=node, world_size=count, timeout=patience
    )
    skew = _clock_skew(node, count)
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    mine = dataclasses.replace(mine, clock_skew_s=skew, link_gb_s=_link_rate(node, count, device))
    measured: list[Measurement] = [mine] * count
    dist.all_gather_object(measured, mine)
    dist.barrier()
    dist.destroy_process_group()
    return measured


def _clock_skew(node: int, count: int) -> float:
    """Seconds that this node's clock is ahead of node 0's, as well as the fastest of some round trips can tell."""
    skew = 0.0
    for other in range(1, count):
        if node not in (0, other):
            continue
        shortest = float("inf")
        for _ in range(4):
            sent, answer = time.time(), torch.zeros(1, dtype=torch.float64)
            if node == 0:
                dist.recv(answer, src=other)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), dst=other)
                continue
            dist.send(answer, dst=0)
            dist.recv(answer, src=0)
            received = time.time()
            if received - sent < shortest:
                shortest, skew = received - sent, (sent + received) / 2 - answer.item()
    return skew


def _link_rate(node: int, count: int, device: torch.device) -> float | None:
    """GB/s each way to the better of this node's two neighbours, both sending at once; None for a node without neighbours.

    Neighbours are measured in pairs, first (0, 1), (2, 3), ..., then (1, 2), (3, 4), ...: a slow node spoils both of its own
    pairs, but only one of each neighbour's.
    """
    values = (1 << 26) if device.type == "cuda" else (1 << 20)
    outgoing, incoming = torch.ones(values, device=device), torch.empty(values, device=device)
    best = None
    for first in (0, 1):
        mate = node + 1 if (node - first) % 2 == 0 else node - 1
        if count > 2 and count % 2 == 0:
            mate %= count  # the last and the first are neighbours too
        dist.barrier()
        if not 0 <= mate < count:
            continue
        for _ in range(3):
            began = time.perf_counter()
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, outgoing, mate), dist.P2POp(dist.irecv, incoming, mate)]
            ):
                work.wait()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rate = outgoing.nbytes / (time.perf_counter() - began) / 1e9
            best = max(best or 0.0, rate)
    return best


def _report(measured: list[Measurement], verdict: Verdict, run: RunDir) -> None:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        (
            one.node,
            shown(one.gemm_gflops, ",.0f"),
            shown(one.link_gb_s, ".2f"),
            shown(one.memory_gb, ".1f"),
            shown(one.disk_gb, ".1f"),
            shown(one.clock_skew_s, "+.3f"),
            " ".join(f"{name} {version}" for name, version in one.versions.items()),
        )
        for one in measured
    ]
    table(("node", "GFLOP/s", "GB/s", "memory GB", "disk GB", "clock s", "versions"), rows, "preflight", "lrrrrr")
    for problem in verdict.problems:
        say(f"{'broken' if problem.broken else 'slow'} node {problem.node}: {problem.what}")
    nodes = [dataclasses.asdict(one) for one in measured]
    append_event(run.events, "preflight", nodes=nodes, problems=[dataclasses.asdict(problem) for problem in verdict.problems])
