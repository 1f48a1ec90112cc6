"""`lctrain plan plan.search=true`: all grids of so many devices, planned and ranked.

What a sublayer costs depends on cp, tp and checkpointing alone, so the model is rehearsed once for each of these. Strategies of
attention are simulated for each pair of cp and tp, and the fastest of a few is taken. Layouts whose weights, gradients and
optimizer state alone do not fit are dropped before that; checkpointing is tried only where a layout does not fit without.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lctrain.attention_choice import attention_kinds, costliest_case
from lctrain.config.cluster import ClusterConfig
from lctrain.config.schema import ParallelConfig, TrainConfig
from lctrain.console import progress
from lctrain.errors import UserError
from lctrain.models.pattern import parse_pattern
from lctrain.parallel.strategy import Strategy
from lctrain.plan.attention import attention_cluster, attention_time
from lctrain.plan.cost import PartCost, StaticMemory
from lctrain.plan.layers import Layers, Stage
from lctrain.plan.plan import Plan, Rehearse, Static, make_plan, planned_cluster, rehearsed
from lctrain.plan.static import static_memory
from lctrain.plan.variants import variant

STRATEGIES = ("ulysses", "ring", "usp", "all_gather")
"""Tried in this order; of equal ones the first."""
NO_STRATEGY = {
    f"parallel__{name}": ParallelConfig.model_fields[name].default
    for name in ("attention", "ulysses", "ring", "nesting", "node_size")
}
"""What the user says of it is not a part of any layout that is tried."""


@dataclasses.dataclass
class Found:
    """plans: those that fit, fastest first. dropped: layouts that do not fit. refused: layouts that the config's checks refuse,
    with the first reason."""

    plans: list[Plan]
    dropped: int
    refused: int
    reason: str
    least: Plan | None
    """Of those that do not fit, the one that lacks least."""


class Grid(NamedTuple):
    """Sizes of the dimensions of a layout."""

    pp: int
    dp: int
    cp: int
    tp: int


def grids(devices: int, ranks_per_node: int, engine: str) -> Iterator[Grid]:
    """All grids of so many devices, tensor parallelism within a node; what an engine cannot do left out."""
    for tp in _divisors(math.gcd(devices, ranks_per_node)) if engine != "torch" else (1,):
        for pp in _divisors(devices // tp) if engine != "torch" else (1,):
            for cp in _divisors(devices // tp // pp):
                yield Grid(pp, devices // (tp * pp * cp), cp, tp)


def search(
    config: TrainConfig, devices: int, reserve: float, rehearse: Rehearse = rehearsed, static: Static = static_memory
) -> Found:
    """Plan every layout of so many devices. UserError if the config's checks refuse all of them."""
    config = variant(config.model_copy(update={"cluster": planned_cluster(config)}), **NO_STRATEGY)
    assert config.cluster is not None
    looking = _Search(config.cluster, reserve, rehearse, static)
    candidates = [
        settings
        for grid in grids(devices, config.cluster.ranks_per_node, config.engine.name)
        for settings in _settings(config, grid)
    ]
    with progress(f"layouts of {devices} devices", len(candidates), "layouts") as advance:
        for settings in candidates:
            looking.look(config, settings)
            advance(1)
    found = looking.found
    if not found.plans and not found.dropped:
        raise UserError(
            f"plan.gpus={devices}: no layout of that many devices passes the checks; the first says: {found.reason}"
        )
    found.plans.sort(key=lambda plan: -plan.tokens_per_s)
    return found


class _Search:
    """Plans layouts, keeps what several of them share."""

    def __init__(self, cluster: ClusterConfig, reserve: float, rehearse: Rehearse, static: Static) -> None:
        self.cluster, self.reserve, self._rehearse, self._static = cluster, reserve, rehearse, static
        self.found = Found([], 0, 0, "", None)
        self._stages: dict[tuple[int, int], tuple[Stage, ...]] = {}
        self._statics: dict[tuple[Any, ...], StaticMemory] = {}
        self._costs: dict[tuple[Any, ...], Mapping[str, PartCost]] = {}
        self._strategies: dict[tuple[int, int], str] = {}

    def look(self, config: TrainConfig, settings: dict[str, Any]) -> None:
        """Plan one layout, with checkpointing if need be."""
        kinds = ("layer",) if config.engine.activation_checkpointing == "layer" else ("none", "layer")
        for checkpointing in kinds:
            try:
                chosen = variant(config, **settings, engine__activation_checkpointing=checkpointing)
            except UserError as error:
                self.found.refused += 1
                self.found.reason = self.found.reason or str(error)
                return
            if not self._has_room(chosen):
                break
            plan = make_plan(self._with_strategy(chosen), self.reserve, self.costs, self.static)
            if plan.fits:
                self.found.plans.append(plan)
                return
            if self.found.least is None or plan.most < self.found.least.most:
                self.found.least = plan
        self.found.dropped += 1

    def costs(self, config: TrainConfig) -> Mapping[str, PartCost]:
        """Rehearsed, or known from a layout that is alike in all that matters to a sublayer."""
        parallel = config.parallel
        key = (config.cp, parallel.tp, parallel.ep, parallel.etp, config.engine.activation_checkpointing, parallel.attention)
        if key not in self._costs:
            self._costs[key] = self._rehearse(config)
        return self._costs[key]

    def static(self, config: TrainConfig, stage: int) -> StaticMemory:
        """Asked for, or known from a stage with the same layers, divided over as many ranks."""
        parallel = config.parallel
        cut = parallel.pp, parallel.virtual_stages
        if cut not in self._stages:
            self._stages[cut] = Layers(config).stages
        key = parallel.tp, parallel.pp, config.engine.data_parallel, self._stages[cut][stage].pieces
        if key not in self._statics:
            self._statics[key] = self._static(config, stage)
        return self._statics[key]

    def _has_room(self, config: TrainConfig) -> bool:
        """Whether weights, gradients and optimizer state fit, on the first and the last stage."""
        assert self.cluster.device is not None
        limit = self.cluster.device.memory_gb * 1e9 * (1 - self.reserve)
        return all(sum(self.static(config, stage)) <= limit for stage in {0, config.parallel.pp - 1})

    def _with_strategy(self, config: TrainConfig) -> TrainConfig:
        """With the fastest of STRATEGIES, all kinds of attention layers together."""
        if config.cp == 1:
            return config
        key = config.cp, config.parallel.tp
        if key not in self._strategies:
            self._strategies[key] = min(STRATEGIES, key=lambda name: attention_seconds(config, self.cluster, name))
        return variant(config, parallel__attention=self._strategies[key])


def attention_seconds(config: TrainConfig, cluster: ClusterConfig, name: str) -> float:
    """Forward and backward of all attention layers with one strategy; infinite if it has too few heads for the ranks."""
    strategy, seen = Strategy(name), attention_cluster(config, cluster)
    symbols = [layer.symbol for layer in parse_pattern(config.model.pattern)]
    total = 0.0
    for symbol, kind in attention_kinds(config).items():
        case = costliest_case(config, kind)
        if name == "ulysses" and config.cp > case[2].n_heads:
            return math.inf
        total += symbols.count(symbol) * sum(
            attention_time(strategy, *case, way, seen).total for way in ("forward", "backward")
        )
    return total


def _settings(config: TrainConfig, grid: Grid) -> Iterator[dict[str, Any]]:
    settings: dict[str, Any] = {f"parallel__{name}": size for name, size in grid._asdict().items()}
    if grid.pp == 1:
        settings["parallel__virtual_stages"] = 1
    ways = ("ddp", "fsdp") if config.engine.name == "torch" and grid.dp * grid.cp > 1 else (config.engine.data_parallel,)
    for way in ways:
        yield {**settings, "engine__data_parallel": way}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
