"""Memory of a rank by category, for every pipeline stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lctrain.config.deepspeed import checked_config, zero_stage
from lctrain.config.schema import TrainConfig
from lctrain.plan.cost import FP32, PartCost, StaticMemory
from lctrain.plan.layers import Layers, Parameters, Stage
from lctrain.plan.timing import micro_batches


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """Bytes of a rank of a stage when it holds most.

    activations: kept for backward, of all micro-batches in flight. working: the largest part's most at one time beyond that.
    buffers: of communication: buckets, gathered weights, messages between stages.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them: an upper bound, as not all of them are at their most at once."""
        return sum(dataclasses.astuple(self))


def stage_memory(
    config: TrainConfig, layers: Layers, stage: Stage, costs: Mapping[str, PartCost], static: StaticMemory, message: int
) -> StageMemory:
    """message: bytes that travel from stage to stage for one micro-batch."""
    kept = [sum(costs[part].kept for part in piece) for piece in stage.pieces]
    working = max(max(costs[part].forward.peak, costs[part].backward.peak) for part in stage.parts)
    buffers = communication_buffers(config, layers.parameters(stage, static)) + (2 * message if config.parallel.pp > 1 else 0)
    activations = most_kept(kept, config.parallel.pp, stage.index, micro_batches(config))
    return StageMemory(static.weights, static.gradients, static.optimizer, activations, working, buffers)


def most_kept(kept: Sequence[int], pp: int, stage: int, passes: int) -> int:
    """Most bytes that a stage keeps for backward under 1F1B, interleaved if it has several pieces, as megatron-core orders it.

    kept: of one micro-batch in each piece. passes: micro-batches of a step.
    """
    pieces, total = len(kept), passes * len(kept)
    ahead = pp - stage - 1 if pieces == 1 else 2 * (pp - stage - 1) + (pieces - 1) * pp
    live = most = 0
    for at in range(total):
        live += kept[at % (pp * pieces) // pp]
        most = max(most, live)
        if at >= ahead:
            live -= kept[pieces - 1 - (at - ahead) % (pp * pieces) // pp]
    return most


def communication_buffers(config: TrainConfig, held: Parameters) -> int:
    """Bytes that data parallelism holds besides weights and gradients.

    DDP's buckets and megatron-core's are the gradients. FSDP2 holds the whole weights of embedding and head and of two
    sublayers, one of them fetched ahead; in backward the gradients of embedding and head, and a sublayer's on their way.
    DeepSpeed has buckets for gradients, two if it overlaps; ZeRO-3 lets up to stage3_max_live_parameters stay gathered.
    """
    if config.processes == 1:
        return 0
    if config.engine.data_parallel == "fsdp":
        return FP32 * (2 * held.root + 3 * held.largest)
    if config.engine.name != "deepspeed" or zero_stage(config) == 0:
        return 0
    stage, zero = zero_stage(config), checked_config(config).get("zero_optimization", {})
    count = held.dense + held.expert
    overlap = zero.get("overlap_comm")
    doubled = stage == 3 if overlap is None else bool(overlap)
    bucket = min(count, int(zero.get("reduce_bucket_size", 500_000_000))) * (2 if doubled and stage < 3 else 1)
    live = min(count, int(zero.get("stage3_max_live_parameters", 1_000_000_000))) if stage == 3 else 0
    return FP32 * (bucket + live)
