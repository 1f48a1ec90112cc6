"""A plan: what one config will take of memory and time on a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property

import torch

from lctrain.attention_choice import attention_kinds, attention_shapes, cluster_of, describe_strategy
from lctrain.config.cluster import ClusterConfig
from lctrain.config.deepspeed import checked_config
from lctrain.config.schema import TrainConfig
from lctrain.devices import choose_device, published_flops
from lctrain.errors import UserError
from lctrain.models.size import Size, model_size
from lctrain.parallel.strategy import Strategy
from lctrain.plan.cost import PartCost, StaticMemory
from lctrain.plan.layers import Layers
from lctrain.plan.memory import StageMemory, stage_memory
from lctrain.plan.static import static_memory
from lctrain.plan.step_time import StepTime
from lctrain.plan.timing import Timing

Rehearse = Callable[[TrainConfig], Mapping[str, PartCost]]
Static = Callable[[TrainConfig, int], StaticMemory]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What lctrain plan finds out.

    cluster: with its `device`. size: parameters. flops: of a step over all ranks, forward once and backward twice that, as the
    MFU of `lctrain train` counts them. memory: of a rank, by pipeline stage. sent: bytes of a rank in a step, by dimension of
    the mesh, most of any stage. strategies: of attention, by symbol. limit: bytes that a rank may use.
    """

    config: TrainConfig
    cluster: ClusterConfig
    size: Size
    flops: int
    memory: tuple[StageMemory, ...]
    step: StepTime
    sent: Mapping[str, int]
    strategies: Mapping[str, str]
    limit: float

    @property
    def most(self) -> int:
        """Bytes of the stage that needs most."""
        return max(stage.total for stage in self.memory)

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return self.most <= self.limit

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.trainer.global_batch * self.config.trainer.seq_len

    @property
    def tokens_per_s(self) -> float:
        """Of one device."""
        return self.tokens / self.step.total / self.config.processes

    @cached_property
    def peak(self) -> float:
        """FLOP/s of a device that count as 100 %."""
        return peak_flops(self.cluster, self.config.engine.dtype)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return self.flops / (self.step.total * self.config.processes * self.peak)


def make_plan(
    config: TrainConfig, reserve: float = 0.1, rehearse: Rehearse | None = None, static: Static = static_memory
) -> Plan:
    """Rehearse the model and add up. UserError for what cannot be planned."""
    cluster = planned_cluster(config)
    assert cluster.device is not None
    config = config.model_copy(update={"cluster": cluster})
    check_plannable(config)
    layers = Layers(config)
    statics = {stage.index: static(config, stage.index) for stage in layers.stages}
    costs = (rehearse or rehearsed)(config)
    timing = Timing(config, cluster, layers, costs, statics)
    message = timing.activation_bytes()
    memory = tuple(stage_memory(config, layers, stage, costs, statics[stage.index], message) for stage in layers.stages)
    times = timing.stages()
    sent = {name: max(time.sent.get(name, 0) for time in times) for name in dict.fromkeys(n for t in times for n in t.sent)}
    length = config.trainer.seq_len
    flops = 3 * config.trainer.global_batch * layers.model.flops(((0, length),))
    strategies = {
        symbol: describe_strategy(settled(timing.strategies[kind], config.cp, attention_shapes(config)[kind].n_kv_heads))
        for symbol, kind in attention_kinds(config).items()
        if config.cp > 1
    }
    limit = cluster.device.memory_gb * 1e9 * (1 - reserve)
    return Plan(config, cluster, model_size(config.model), flops, memory, timing.step(times), sent, strategies, limit)


def settled(strategy: Strategy, ranks: int, kv_heads: int) -> Strategy:
    """With numbers where the strategy leaves degrees open."""
    return dataclasses.replace(strategy, ulysses=strategy.group_size(ranks, kv_heads), node=strategy.node_size(ranks))


def rehearsed(config: TrainConfig) -> Mapping[str, PartCost]:
    """What the parts cost on the config's cluster."""
    from lctrain.plan.rehearse import rehearse

    assert config.cluster is not None
    return rehearse(config, on_cuda=not on_cpu(config.cluster))


def on_cpu(cluster: ClusterConfig) -> bool:
    """Whether processes compute on the host's cores: those that move bytes themselves do."""
    return cluster.cpu_s_per_gb > 0


def planned_cluster(config: TrainConfig) -> ClusterConfig:
    """The config's cluster, or the preset of the device here; UserError if a plan cannot do with it."""
    cluster = config.cluster or cluster_of(config, _device_here(config))
    if cluster.device is None:
        raise UserError(
            f"cluster={cluster.name} does not say what a device can do: give it cluster.device.memory_gb, gb_per_s and"
            " product_tflops, as configs/cluster/h200.yaml does"
        )
    peak_flops(cluster, config.engine.dtype)
    return cluster


def _device_here(config: TrainConfig) -> torch.device:
    try:
        return choose_device(config.engine.device)
    except UserError:
        raise UserError(
            "engine.device=cuda, but torch sees no CUDA device here: say what to plan for, as cluster=h200"
        ) from None


def peak_flops(cluster: ClusterConfig, dtype: str) -> float:
    """FLOP/s of a device that count as 100 % MFU, as in `lctrain train`: published ones for bf16, else what products reach."""
    device = cluster.device
    assert device is not None
    if dtype == "bf16" and device.published is not None:
        published = published_flops(device.published)
        if published is None:
            raise UserError(
                f"cluster.device.published={device.published} is not a device that lctrain.devices knows; take null"
            )
        return published
    rate: float = getattr(device.product_tflops, dtype) * 1e12
    return rate


def check_plannable(config: TrainConfig) -> None:
    """UserError for what a plan would be wrong about."""
    if config.engine.name == "deepspeed":
        zero = checked_config(config).get("zero_optimization", {})
        for key in ("offload_optimizer", "offload_param"):
            if (zero.get(key) or {}).get("device") not in (None, "none"):
                raise UserError(f"engine.deepspeed_config: a plan knows nothing of {key} yet; drop it to plan without")
