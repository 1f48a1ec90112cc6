"""engine=deepspeed without pipeline stages: the whole model under ZeRO 0 to 3."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.config.deepspeed import zero_stage
from lctrain.config.schema import TrainConfig
from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.engines.base import StepResult
from lctrain.engines.deepspeed.allocate import allocate, allocate_shards
from lctrain.engines.deepspeed.base import DeepSpeedCommon
from lctrain.engines.deepspeed.experts import Experts
from lctrain.engines.deepspeed.mpu import Mpu
from lctrain.engines.deepspeed.settings import check_by_deepspeed, deepspeed_config
from lctrain.engines.deepspeed.start import start_deepspeed
from lctrain.models.build import build_model
from lctrain.models.model import LossSums
from lctrain.models.parallel import ModelParallel
from lctrain.optim import make_adamw
from lctrain.parallel.mesh import MeshGroups, ProcessMesh


class ZeroEngine(DeepSpeedCommon):
    """See lctrain.engines.base.Engine and DeepSpeedCommon."""

    def __init__(self, config: TrainConfig, mesh: ProcessMesh, groups: MeshGroups, device: torch.device) -> None:
        deepspeed = start_deepspeed(device)
        model = build_model(config, ModelParallel(groups.tp, groups.ep, groups.etp, groups.dp_cp))
        super().__init__(config, mesh, groups, device, model)
        stage, seed, mpu = zero_stage(config), config.trainer.seed, Mpu(mesh, groups)
        settings = deepspeed_config(config, mesh, sum(part.shape.numel() for part in self.parts.values()))
        check_by_deepspeed(settings, mpu)
        optimizer = make_adamw(model, config.optim)  # now, as sharded parameters do not tell matrices from vectors
        names = {parameter: name for name, parameter in model.named_parameters()}
        experts = Experts(model, mesh, groups, mpu, stage)
        if stage == 3:
            allocate_shards(model, seed, device, experts, settings, mpu)
        else:
            allocate(model, seed, device, experts)
        for group in optimizer.param_groups:
            group["params"] = [model.get_parameter(names[parameter]) for parameter in group["params"]]
        experts.declare(model, optimizer)
        self.adopt(deepspeed.initialize(model=model, optimizer=optimizer, mpu=mpu, config=settings)[0])

    def backward(self, batch: StepBatch, targets: int) -> StepResult:
        """See Engine."""
        losses = []
        for index, micro in enumerate(batch.micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(batch.micro_batches) - 1)
            sums = self._forward(micro)
            self.engine.backward(sums.objective * (self.size / max(1, targets)), scale_wrt_gas=False)
            losses.append(sums.cross_entropy.detach() * (self.mesh.tp_rank == 0))  # all tp ranks have the same
        return self.result(batch, targets, losses)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """See Engine."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in batches:
            totals[0] += self._forward(micro).cross_entropy / self.mesh.tp
            totals[1] += micro.targets / (self.mesh.cp * self.mesh.tp)  # all of those ranks count the whole rows
        if self.mesh.size > 1:
            dist.all_reduce(totals)
        return float(totals[0] / totals[1]) if totals[1] else math.nan

    @torch.no_grad()
    def token_losses(self, batches: Iterable[MicroBatch]) -> list[Tensor]:
        """See Engine."""
        return [self._forward(micro).per_token for micro in batches]

    def _forward(self, micro: MicroBatch) -> LossSums:
        trainer = self.config.trainer
        tokens, labels = (x.to(self.device, non_blocking=True) for x in (micro.tokens, micro.labels))
        sums: LossSums = self.engine(tokens, labels, self.sequence(micro), trainer.loss_chunk, trainer.z_loss)
        return sums
