"""`lctrain bench checkpoint`: how long a step waits for a checkpoint, beside torch.save."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lctrain.bench.report import check_output, introduce_machine, store
from lctrain.checkpoint.background import Saver
from lctrain.checkpoint.folders import free_bytes
from lctrain.checkpoint.store import CheckpointStore
from lctrain.config.bench_checkpoint import CheckpointBenchConfig
from lctrain.console import progress, say, table
from lctrain.errors import UserError

PLAIN = "torch.save"
SYNCED = "torch.save, fsync"
AT_ONCE = "lctrain"
BACKGROUND = "lctrain, asynchronous"
ABOUT = {
    PLAIN: "the bytes may still be in the page cache",
    SYNCED: "on disk",
    AT_ONCE: "on disk, hashed, replaced by a rename",
    BACKGROUND: "the same; the step waits for the copy alone",
}

State = dict[str, dict[str, torch.Tensor]]


def bench_checkpoint(config: CheckpointBenchConfig) -> int:
    """Measure, print, store."""
    check_output(config)
    folder = Path(config.folder)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"folder={config.folder} is not a folder that can be written to")
    if free_bytes(folder) < 4 * config.mb * 10**6:
        raise UserError(
            f"folder={config.folder} has {free_bytes(folder) / 1e9:.1f} GB free: mb={config.mb} needs four times that"
        )
    machine = introduce_machine()
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    state = _state(config)
    size = sum(tensor.nbytes for part in state.values() for tensor in part.values())
    say(f"state of {size / 1e6:,.0f} MB in {3 * config.tensors} tensors, {threads} threads, median of {config.repeats} saves\n")
    place = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=folder))
    try:
        results, first_s = _measure(config, state, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    base = next(result["waits_s"] for result in results if result["name"] == PLAIN)
    rows = [
        [r["name"], f"{r['waits_s']:.3f}", f"{r['done_s']:.3f}", f"{r['waits_s'] / base:.1%}", ABOUT[r["name"]]]
        for r in results
    ]
    table(("save", "step waits, s", "until done, s", f"of {PLAIN}", ""), rows, align="lrrr")
    say(f"\nthe first asynchronous save, which makes the host buffers, waits {first_s:.3f} s")
    store(config, "checkpoint", machine, [*results, {"name": "first asynchronous", "waits_s": first_s}])
    return 0


def _state(config: CheckpointBenchConfig) -> State:
    numel = max(1, config.mb * 10**6 // (3 * 4 * config.tensors))
    parts = ("model", "exp_avg", "exp_avg_sq")
    return {part: {f"layer{number}": torch.randn(numel) for number in range(config.tensors)} for part in parts}


def _measure(config: CheckpointBenchConfig, state: State, place: Path) -> tuple[list[dict[str, Any]], float]:
    """Median seconds of each way, taken in turn; and what the first asynchronous save waits."""
    at_once = Saver(CheckpointStore(place / "at_once", keep_last=1), asynchronous=False)
    background = Saver(CheckpointStore(place / "background", keep_last=1), asynchronous=True)

    def plain(sync: bool) -> tuple[float, float]:
        began = time.perf_counter()
        with open(place / "plain.pt", "wb") as file:
            torch.save(state, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        (place / "plain.pt").unlink()
        return seconds, seconds

    def ours(saver: Saver, step: int) -> tuple[float, float]:
        saver.save(step, state, {})
        saver.wait()
        (saved,) = saver.finished()
        return saved.stall_s, saved.seconds

    ways: dict[str, Callable[[int], tuple[float, float]]] = {
        PLAIN: lambda step: plain(False),
        SYNCED: lambda step: plain(True),
        AT_ONCE: lambda step: ours(at_once, step),
        BACKGROUND: lambda step: ours(background, step),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with progress("saving", (config.repeats + 1) * len(ways), "saves") as advance:
        for step in range(1, config.repeats + 2):
            for name, way in ways.items():
                os.sync()  # nobody pays for what another has left in the page cache
                times[name].append(way(step))
                advance(1)
    results = []
    for name, (_, *timed) in times.items():
        waits, done = ([pair[i] for pair in timed] for i in (0, 1))
        results.append(
            {"name": name, "waits_s": median(waits), "done_s": median(done), "all_waits_s": waits, "all_done_s": done}
        )
    return results, times[BACKGROUND][0][0]
