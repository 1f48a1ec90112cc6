"""What every benchmark says about its machine, and how results are stored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lctrain import whole_file
from lctrain.config.bench import BenchConfig, PeersBenchConfig
from lctrain.config.bench_checkpoint import CheckpointBenchConfig
from lctrain.config.bench_plan import PlanBenchConfig
from lctrain.console import say
from lctrain.environment import describe_environment


def check_output(config: BenchConfig | PeersBenchConfig | CheckpointBenchConfig | PlanBenchConfig) -> None:
    """UserError now rather than after an hour of measuring, if the results could not be written."""
    whole_file.check_output("output", config.output)


def introduce_machine() -> dict[str, Any]:
    """Print what is measured on, and how busy it is already; returns the full description."""
    machine = describe_environment()
    load = os.getloadavg()[0]
    machine["load_before"] = load
    busy = f"; the machine is busy (load {load:.1f}), so times are noisy" if load > 0.3 else ""
    say(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['packages']['torch']}{busy}")
    return machine


def store(
    config: BenchConfig | PeersBenchConfig | CheckpointBenchConfig | PlanBenchConfig,
    benchmark: str,
    machine: dict[str, Any],
    results: Sequence[dict[str, Any]],
) -> None:
    """Write settings, machine and results as JSON if the user wants them."""
    if config.output is None:
        return
    settings = config.model_dump(mode="json", exclude={"output"})
    whole_file.write_json(
        Path(config.output), {"benchmark": benchmark, "settings": settings, "machine": machine, "results": list(results)}
    )
    say(f"results in {config.output}")
