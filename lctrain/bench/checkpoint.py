"""`lctrain bench checkpoint`: what checkpoints cost a run that computes between them, beside torch.save."""

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

NONE = "none"
PLAIN = "torch.save"
SYNCED = "torch.save, fsync"
AT_ONCE = "lctrain"
BACKGROUND = "lctrain, asynchronous"
ABOUT = {
    NONE: "",
    PLAIN: "the bytes may still be in the page cache",
    SYNCED: "on disk",
    AT_ONCE: "on disk, hashed, replaced by a rename",
    BACKGROUND: "the same, written while the steps go on",
}
WIDTH = 512
"""Of the matrices that steps multiply."""

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
    say(
        f"state of {size / 1e6:,.0f} MB in {3 * config.tensors} tensors, {threads} threads;"
        f" {config.steps} steps of {config.step_s:g} s and an update after every save, median of {config.repeats} saves\n"
    )
    place = Path(tempfile.mkdtemp(prefix="bench-checkpoint-", dir=folder))
    try:
        results, first_s = _measure(config, state, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    waits = {result["name"]: result["waits_s"] for result in results}
    rows = [
        [
            r["name"],
            *(f"{r[key]:.3f}" for key in ("waits_s", "longer_s", "done_s")),
            *(f"{r['waits_s'] / waits[base]:.1%}" for base in (PLAIN, SYNCED)),
            ABOUT[r["name"]],
        ]
        for r in results
    ]
    head = ("save", "steps wait, s", "run longer by, s", "until done, s", f"wait of {PLAIN}", "of that with fsync", "")
    table(head, rows, align="lrrrrr")
    say(f"\nthe first asynchronous save, which makes the host buffers: steps wait {first_s:.3f} s")
    store(config, "checkpoint", machine, [*results, {"name": "first asynchronous", "waits_s": first_s}])
    return 0


def _state(config: CheckpointBenchConfig) -> State:
    numel = max(1, config.mb * 10**6 // (3 * 4 * config.tensors))
    parts = ("model", "exp_avg", "exp_avg_sq")
    return {part: {f"layer{number}": torch.randn(numel) for number in range(config.tensors)} for part in parts}


class _Steps:
    """Training as a checkpoint sees it: all cores compute for a while, then every tensor of the state changes."""

    def __init__(self, config: CheckpointBenchConfig, state: State) -> None:
        self._tensors = [tensor for part in state.values() for tensor in part.values()]
        self._matrices = torch.randn(2, WIDTH, WIDTH) / WIDTH**0.5
        self._steps, self._products = config.steps, 20
        self._compute()  # threads and caches
        began = time.perf_counter()
        self._compute()
        self._products = max(1, round(self._products * config.step_s / (time.perf_counter() - began)))

    def run(self, before_change: Callable[[], None]) -> None:
        """All steps between two saves."""
        for _ in range(self._steps):
            self._compute()
            before_change()
            torch._foreach_mul_(self._tensors, 1.001)

    def _compute(self) -> None:
        for _ in range(self._products):
            torch.mm(*self._matrices)


def _measure(config: CheckpointBenchConfig, state: State, place: Path) -> tuple[list[dict[str, Any]], float]:
    """Median seconds of each way, taken in turn; and what steps wait for the first asynchronous save.

    waits_s: in calls that save, or wait for what is being saved. longer_s: a save and its steps, over the same steps alone.
    """
    steps = _Steps(config, state)
    savers = {
        AT_ONCE: Saver(CheckpointStore(place / "at_once", keep_last=1), asynchronous=False),
        BACKGROUND: Saver(CheckpointStore(place / "background", keep_last=1), asynchronous=True),
    }

    def bare(name: str) -> tuple[float, float, float]:
        began = time.perf_counter()
        if name != NONE:
            with open(place / "plain.pt", "wb") as file:
                torch.save(state, file)
                if name == SYNCED:
                    file.flush()
                    os.fsync(file.fileno())
        saved = time.perf_counter()
        steps.run(lambda: None)
        return saved - began, saved - began, time.perf_counter() - began

    def ours(saver: Saver, number: int) -> tuple[float, float, float]:
        began = time.perf_counter()
        saver.save(number, state, {})
        steps.run(saver.before_change)
        saver.wait()  # if it takes longer than the steps, the next save would wait
        whole = time.perf_counter() - began
        (saved,) = saver.finished()
        return saved.stall_s, saved.seconds, whole

    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ABOUT}
    with progress("saving", (config.repeats + 1) * len(ABOUT), "saves") as advance:
        for number in range(1, config.repeats + 2):
            for name in ABOUT:
                os.sync()  # nobody pays for what another has left in the page cache
                times[name].append(ours(savers[name], number) if name in savers else bare(name))
                (place / "plain.pt").unlink(missing_ok=True)
                advance(1)
    alone = median(whole for *_, whole in times[NONE][1:])
    results = []
    for name, (_, *timed) in times.items():
        waits, done, whole = ([values[i] for values in timed] for i in range(3))
        longer = [seconds - alone for seconds in whole]
        results.append(
            {
                "name": name,
                **{"waits_s": median(waits), "done_s": median(done), "longer_s": median(longer)},
                **{"all_waits_s": waits, "all_done_s": done, "all_longer_s": longer},
            }
        )
    return results, times[BACKGROUND][0][0]
