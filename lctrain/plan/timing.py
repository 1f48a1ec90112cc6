"""Seconds of one optimizer step by cause, from what the parts cost, the simulator, and the links.

An operation takes as long as its arithmetic or its memory traffic, whichever is longer. Attention's kernels and messages are
the simulator's; what else travels between sublayers is waited for. Micro-batches go through pipeline stages in 1F1B order,
interleaved if stages have several pieces: the slowest stage works all the time, and waits besides for one passage through all
others, or a piece of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from lctrain.attention_choice import attention_kinds, attention_strategies, costliest_case
from lctrain.config.cluster import ClusterConfig
from lctrain.config.deepspeed import zero_stage
from lctrain.config.device import DeviceConfig
from lctrain.config.schema import TrainConfig
from lctrain.devices import DTYPES
from lctrain.parallel.deal import make_layout
from lctrain.parallel.schedule import Direction
from lctrain.plan.attention import attention_cluster, attention_time
from lctrain.plan.cost import FP32, PartCost, PassCost, Sent, StaticMemory
from lctrain.plan.counted_group import ATTENTION
from lctrain.plan.counting import IN_ATTENTION
from lctrain.plan.layers import Layers, Stage
from lctrain.plan.links import host_seconds, sent_seconds
from lctrain.plan.replicas import Replicated, replicated
from lctrain.plan.step_time import StepTime

CAUSE = {
    **{"cp": "sequence", "tp": "tensor", "ep": "experts", "etp": "experts", "edp": "data"},
    **{"dp": "data", "dp_cp": "data", "pp": "pipeline"},
}
"""Dimension of the mesh -> field of StepTime that pays for what travels along it."""
ADAMW_BYTES = 28
"""Of an element: weight, gradient and moments read, weight and moments written, all fp32."""
NORM_BYTES = 12
"""Of an element of the gradient: read for the norm; read and written for clipping."""


@dataclasses.dataclass(frozen=True)
class StageTime:
    """Of a stage: forward and backward pass of one micro-batch; data parallelism and optimizer of one step. Seconds.

    sent: bytes of a step by dimension of the mesh.
    """

    forward: StepTime
    backward: StepTime
    once: StepTime
    sent: Mapping[str, int]

    @property
    def micro_batch(self) -> float:
        """Both directions."""
        return self.forward.total + self.backward.total


class Timing:
    """Prices the steps of one config.

    costs: from rehearse(). statics: of every stage, from static_memory().
    """

    def __init__(
        self,
        config: TrainConfig,
        cluster: ClusterConfig,
        layers: Layers,
        costs: Mapping[str, PartCost],
        statics: Mapping[int, StaticMemory],
    ) -> None:
        assert cluster.device is not None
        self.config, self.cluster, self.layers, self.costs, self.statics = config, cluster, layers, costs, statics
        self.device: DeviceConfig = cluster.device
        self.mesh = layers.mesh
        self.micro_batches = micro_batches(config)
        self._seen, self._kinds = attention_cluster(config, cluster), attention_kinds(config)
        named = config.model_copy(update={"cluster": cluster})
        self.strategies = attention_strategies(named, torch.device("cpu"))

    def stages(self) -> tuple[StageTime, ...]:
        """All stages in order."""
        return tuple(self._stage(stage) for stage in self.layers.stages)

    def step(self, stages: tuple[StageTime, ...]) -> StepTime:
        """The whole step, as the slowest stage sees it."""
        slowest = max(stages, key=lambda stage: stage.micro_batch)
        others = sum(stage.micro_batch for stage in stages) - slowest.micro_batch
        bubble = StepTime(bubble=others / self.config.parallel.virtual_stages)
        return (slowest.forward + slowest.backward) * self.micro_batches + slowest.once + bubble + self._messages()

    def activation_bytes(self) -> int:
        """What travels from stage to stage for one micro-batch."""
        config, length = self.config, self.config.trainer.seq_len
        local = make_layout(config.parallel.layout, config.cp, length, ((0, length),)).local_length
        share = -(-local // config.parallel.tp)
        return config.trainer.micro_batch * share * config.model.d_model * DTYPES[config.engine.dtype].itemsize

    def _stage(self, stage: Stage) -> StageTime:
        forward, backward = (self._direction(stage, way) for way in ("forward", "backward"))
        held = self.layers.parameters(stage, self.statics[stage.index])
        traffic = replicated(self.config, self.mesh, held, len(stage.parts))
        once = StepTime(
            data=self._data(traffic, forward.total, backward.total), optimizer=self._optimizer(self.statics[stage.index])
        )
        return StageTime(forward, backward, once, self._sent(stage, traffic))

    def _direction(self, stage: Stage, way: Direction) -> StepTime:
        total = StepTime()
        for part in dict.fromkeys(stage.parts):
            total += self._part(part, way) * stage.parts.count(part)
        return total

    def _part(self, name: str, way: Direction) -> StepTime:
        total = pass_time(getattr(self.costs[name], way), self.config, self.cluster, self.layers)
        if name not in self._kinds:
            return total
        kind = self._kinds[name]
        again = way == "backward" and self.config.engine.activation_checkpointing == "layer"
        for direction in (way, "forward") if again else (way,):
            total += attention_time(self.strategies[kind], *costliest_case(self.config, kind), direction, self._seen)
        return total

    def _data(self, traffic: Iterable[Replicated], forward: float, backward: float) -> float:
        """Seconds of a step in which data parallelism is waited for."""
        meanwhile = {"forward": forward, "backward": backward, "last backward": backward}
        times = {"forward": self.micro_batches, "backward": self.micro_batches}
        total, hidden = 0.0, dict[str, list[Sent]]()
        for item in traffic:
            if item.hidden:
                hidden.setdefault(item.when, []).append(item.sent)
            else:
                total += times.get(item.when, 1) * sent_seconds(item.sent, self.mesh, self.cluster)
        for when, calls in hidden.items():
            seconds = [sent_seconds(sent, self.mesh, self.cluster) for sent in calls]
            end = max(
                s / sent.calls for s, sent in zip(seconds, calls, strict=True)
            )  # the last, or first, has nothing beside it
            host = sum(host_seconds(sent, self.cluster) for sent in calls)
            total += times.get(when, 1) * max(end, sum(seconds) - meanwhile[when], host)
        return total

    def _optimizer(self, static: StaticMemory) -> float:
        """Everything between the last gradient and the next step, but for messages."""
        elements = static.optimizer // state_bytes(self.config)
        moved = elements * ADAMW_BYTES + static.gradients // FP32 * NORM_BYTES
        if self.config.engine.name == "megatron":
            moved += static.gradients + static.weights  # buffers set to zero, weights copied from main weights
        return moved / (self.device.gb_per_s * 1e9)

    def _messages(self) -> StepTime:
        """Between stages. Plain 1F1B waits for each; the interleaved schedule for those at its two ends."""
        parallel = self.config.parallel
        if parallel.pp == 1:
            return StepTime()
        one = sent_seconds(Sent("pp", "exchange", self.activation_bytes(), 1), self.mesh, self.cluster)
        each = self.micro_batches if parallel.virtual_stages == 1 else 0
        return StepTime(pipeline=2 * one * (each + parallel.pp - 1))

    def _sent(self, stage: Stage, traffic: Iterable[Replicated]) -> dict[str, int]:
        sent: dict[str, int] = {}
        for part in stage.parts:
            cost = self.costs[part]
            for item in (*cost.forward.sent, *cost.backward.sent):
                sent[item.dimension] = sent.get(item.dimension, 0) + item.bytes * self.micro_batches
        for one in traffic:
            times = self.micro_batches if one.when in ("forward", "backward") else 1
            sent[one.sent.dimension] = sent.get(one.sent.dimension, 0) + one.sent.bytes * times
        if self.config.parallel.pp > 1:
            ends = (stage.index > 0) + (stage.index < self.config.parallel.pp - 1)
            pieces = self.config.parallel.virtual_stages
            neighbours = ends if pieces == 1 else 2
            sent["pp"] = neighbours * pieces * self.activation_bytes() * self.micro_batches
        return sent


def pass_time(cost: PassCost, config: TrainConfig, cluster: ClusterConfig, layers: Layers) -> StepTime:
    """One direction of one part, attention's kernels and messages left out."""
    device = cluster.device
    assert device is not None
    rate = getattr(device.product_tflops, config.engine.dtype) * 1e12
    bandwidth, fixed = device.gb_per_s * 1e9, device.operation_us * 1e-6
    simulated = cluster.kernel.pass_s_per_gb > 0  # then the simulator knows what runs around the kernel
    total = StepTime()
    for operation in cost.operations:
        if simulated and operation.name.startswith(IN_ATTENTION):
            continue
        seconds = operation.calls * (fixed + max(operation.flops / rate, operation.bytes / bandwidth))
        total += StepTime(products=seconds) if operation.flops else StepTime(memory=seconds)
    for sent in cost.sent:
        if sent.collective != ATTENTION:
            total += StepTime(**{CAUSE[sent.dimension]: sent_seconds(sent, layers.mesh, cluster)})
    return total


def micro_batches(config: TrainConfig) -> int:
    """Of a step, on every data-parallel rank."""
    return config.trainer.global_batch // (config.grid["dp"] * config.trainer.micro_batch)


def state_bytes(config: TrainConfig) -> int:
    """Of an element of the optimizer: moments, and main weights where they are not the model's own."""
    engine = config.engine
    if engine.name == "deepspeed":
        return 12 if zero_stage(config) > 0 else 8
    return 12 if engine.name == "megatron" and engine.dtype == "bf16" else 8
