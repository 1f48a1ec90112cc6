"""What every benchmark says about its machine, and how results are stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lctrain.config.bench import BenchConfig, PeersBenchConfig
from lctrain.config.bench_checkpoint import CheckpointBenchConfig
from lctrain.console import say
from lctrain.environment import describe_environment
from lctrain.errors import UserError
from lctrain.whole_file import write_json


def check_output(config: BenchConfig | PeersBenchConfig | CheckpointBenchConfig) -> None:
    """UserError now rather than after an hour of measuring, if the results could not be written."""
    if config.output is None:
        return
    path = Path(config.output)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"output={config.output}: not a file in an existing folder that can be written to")


def introduce_machine() -> dict[str, Any]:
    """Print what is measured on, and how busy it is already; returns the full description."""
    machine = describe_environment()
    load = os.getloadavg()[0]
    machine["load_before"] = load
    busy = f"; the machine is busy (load {load:.1f}), so times are noisy" if load > 0.3 else ""
    say(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['packages']['torch']}{busy}")
    return machine


def store(
    config: BenchConfig | PeersBenchConfig | CheckpointBenchConfig,
    benchmark: str,
    machine: dict[str, Any],
    results: Sequence[dict[str, Any]],
) -> None:
    """Write settings, machine and results as JSON if the user wants them."""
    if config.output is None:
        return
    settings = config.model_dump(mode="json", exclude={"output"})
    write_json(
        Path(config.output), {"benchmark": benchmark, "settings": settings, "machine": machine, "results": list(results)}
    )
    say(f"results in {config.output}")
