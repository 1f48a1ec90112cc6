"""engine=deepspeed with pipeline stages: DeepSpeed's PipelineEngine, ZeRO 0 or 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.config.deepspeed import zero_stage
from lctrain.config.schema import TrainConfig
from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.engines.base import StepResult
from lctrain.engines.deepspeed.base import DeepSpeedCommon
from lctrain.engines.deepspeed.experts import Experts
from lctrain.engines.deepspeed.mpu import Mpu
from lctrain.engines.deepspeed.settings import check_by_deepspeed, deepspeed_config
from lctrain.engines.deepspeed.start import start_deepspeed
from lctrain.models.build import build_model
from lctrain.models.model import LossSums
from lctrain.models.parallel import ModelParallel
from lctrain.models.piece import piece_ranges
from lctrain.optim import make_adamw
from lctrain.parallel.mesh import MeshGroups, ProcessMesh


class PipelineEngine(DeepSpeedCommon):
    """See lctrain.engines.base.Engine and DeepSpeedCommon.

    DeepSpeed's schedule ends with an optimizer step; that instruction is taken out of it and given by `update`.
    """

    def __init__(self, config: TrainConfig, mesh: ProcessMesh, groups: MeshGroups, device: torch.device) -> None:
        deepspeed = start_deepspeed(device)
        from deepspeed.runtime.pipe.schedule import OptimizerStep

        from lctrain.engines.deepspeed.stages import Stages

        whole = build_model(config)
        parallel = ModelParallel(groups.tp, groups.ep, groups.etp, groups.dp_cp)
        stages = Stages(config, mesh, parallel, piece_ranges(config, whole, mesh.pp), device)
        self.piece = stages.own
        super().__init__(config, mesh, groups, device, self.piece)
        optimizer = make_adamw(self.piece, config.optim)
        mpu = Mpu(mesh, groups)
        experts = Experts(self.piece, mesh, groups, mpu, zero_stage(config))
        experts.mark(self.piece.get_parameter(name) for name in experts.names)
        experts.declare(self.piece, optimizer)
        settings = deepspeed_config(config, mesh, sum(part.shape.numel() for part in self.parts.values()))
        check_by_deepspeed(settings, mpu)
        self.adopt(deepspeed.initialize(model=stages, optimizer=optimizer, config=settings)[0])
        self.engine._INSTRUCTION_MAP = {**self.engine._INSTRUCTION_MAP, OptimizerStep: _nothing}
        self._shape: torch.Size | None = None

    def backward(self, batch: StepBatch, targets: int) -> StepResult:
        """See Engine."""
        passes = len(batch.micro_batches)
        # DeepSpeed divides the last stage's objective by the number of micro-batches.
        self.piece.weight = self.size * passes / max(1, targets)
        feed = self._feed(batch.micro_batches)
        self.engine.train_batch(feed)
        return self.result(batch, targets, self._own_losses(passes))

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """See Engine."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        copies = self.mesh.pp * self.mesh.cp * self.mesh.tp  # ranks that all count the targets of whole rows
        for micro_batches in self._evaluated(batches):
            totals[0] += torch.stack(self._own_losses(len(micro_batches))).sum()
            totals[1] += sum(micro.targets for micro in micro_batches) / copies
        if self.mesh.size > 1:
            dist.all_reduce(totals)
        return float(totals[0] / totals[1]) if totals[1] else math.nan

    @torch.no_grad()
    def token_losses(self, batches: Iterable[MicroBatch]) -> list[Tensor]:
        """See Engine."""
        return [each.per_token for _ in self._evaluated(batches) for each in self.piece.sums]

    def step(self) -> None:
        """Let DeepSpeed step."""
        self.engine._exec_optimizer_step()

    def counts(self, name: str) -> bool:
        """The first stage counts a tied embedding."""
        return name != "embedding" or self.piece.first

    def statistics(self) -> dict[str, Any]:
        """Metrics of the mixtures of all stages, in the order of layers."""
        stages: list[dict[str, Any]] = [{} for _ in range(self.mesh.pp)]
        dist.all_gather_object(stages, super().statistics(), group=self.groups.pp.process_group)
        merged: dict[str, Any] = {}
        for stage in stages:
            for name, values in stage.items():
                merged.setdefault(name, []).extend(values)
        return merged

    def _evaluated(self, batches: Iterable[MicroBatch]) -> Iterator[tuple[MicroBatch, ...]]:
        """Forward passes over some micro-batches at a time, whose sums then stand in the last stage."""
        rest = iter(batches)
        while micro_batches := tuple(itertools.islice(rest, self.engine.micro_batches)):
            feed = self._feed(micro_batches)
            self.engine.eval_batch(feed, reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches))
            yield micro_batches

    def _feed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[Tensor, Tensor]]:
        """What DeepSpeed loads in its first and last stage; everything else is laid ready in the piece."""
        self.piece.sums = []
        self.piece.coming = iter(
            [(micro.labels.to(self.device, non_blocking=True), self.sequence(micro)) for micro in micro_batches]
        )
        shapes = {micro.tokens.shape for micro in micro_batches}
        self.engine.dynamic_shape = len(shapes) > 1  # then every activation's shape travels before it
        if shapes != {self._shape}:
            self.engine.reset_activation_shape()
            self._shape = next(iter(shapes)) if len(shapes) == 1 else None
        return iter([(micro.tokens, micro.labels) for micro in micro_batches])

    def _own_losses(self, passes: int) -> list[Tensor]:
        """Each micro-batch's cross-entropy, fp64, on the ranks that count it, and zeros on all others."""
        sums: list[LossSums] = self.piece.sums
        if sums and self.mesh.tp_rank == 0:
            return [each.cross_entropy for each in sums]
        return [torch.zeros((), dtype=torch.float64, device=self.device)] * passes


def _nothing(engine: Any, **_: Any) -> None:
    """In place of an instruction of the schedule."""
