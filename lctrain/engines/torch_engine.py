"""engine=torch: the reference engine. One process, DDP, or FSDP2 over all data- and context-parallel ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lctrain.attention_choice import attention_strategies
from lctrain.config.schema import TrainConfig
from lctrain.data.batch import DocumentSpan, MicroBatch, StepBatch
from lctrain.engines.base import StepResult
from lctrain.engines.cut import CutParameters
from lctrain.engines.problem import describe_problem
from lctrain.models.build import build_model
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel, LossSums
from lctrain.models.moe.stats import forget_statistics, gather_statistics, update_biases
from lctrain.models.parallel import ModelParallel
from lctrain.optim import global_grad_norm, make_adamw, scale_gradients, sum_of_bytes
from lctrain.parallel.deal import make_layout
from lctrain.parallel.mesh import MeshGroups, ProcessMesh
from lctrain.parallel.sequence import SequenceMeta


class TorchEngine:
    """See lctrain.engines.base.Engine.

    Gradient contract: every rank's backward starts from (sum of its token losses) * size / (targets of the global batch), and
    DDP and FSDP average over all size = dp * cp ranks, so the result is the gradient of the mean over all targets, whatever
    each rank holds. Experts lie on ep ranks each, with edp = size / ep copies: see CutParameters.
    """

    def __init__(self, config: TrainConfig, mesh: ProcessMesh, groups: MeshGroups, device: torch.device) -> None:
        self.config, self.mesh, self.groups, self.device = config, mesh, groups, device
        self.strategies = attention_strategies(config, device)
        self.model = build_model(config, ModelParallel(ep=groups.ep, dp_cp=groups.dp_cp))
        self.cut = CutParameters(self.model, mesh, groups, device)
        self.parallel_model = parallelize(self.model, config, mesh, device, self.cut)
        self.optimizer = make_adamw(self.model, config.optim)
        self.grad_norm = 0.0
        if isinstance(self.parallel_model, nn.parallel.DistributedDataParallel):
            self._settle_buckets()

    def backward(self, batch: StepBatch, targets: int) -> StepResult:
        """See Engine."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        losses = []
        for index, micro in enumerate(batch.micro_batches):
            last = index == len(batch.micro_batches) - 1
            with self._gradient_sync(last):
                sums = self._forward(micro)
                (sums.objective * (self.mesh.size / max(1, targets))).backward()
            losses.append(sums.cross_entropy.detach())
            total += losses[-1]
        if self.mesh.size > 1:
            dist.all_reduce(total)
        self.cut.reduce_gradients()
        self.grad_norm = float(global_grad_norm(self.model, self.model.parallel))
        loss = float(total) / max(1, targets)
        problem = None
        if not math.isfinite(loss) or not math.isfinite(self.grad_norm):
            problem = describe_problem(self.mesh, batch, losses, loss, self.grad_norm)
        return StepResult(loss, self.grad_norm, problem, gather_statistics(self.model, self.model.parallel))

    def gradients(self) -> dict[str, Tensor]:
        """See Engine."""
        return {
            name: whole.to("cpu", torch.float32, copy=True)
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
            for whole in [self.cut.whole(name, parameter.grad)]
            if self.mesh.rank == 0
        }

    def update(self, lr: float) -> None:
        """See Engine."""
        clip = self.config.optim.clip_norm
        if clip is not None and self.grad_norm > clip:
            scale_gradients(self.model.parameters(), clip / self.grad_norm)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        self.optimizer.step()
        update_biases(self.model)
        self.discard()

    def discard(self) -> None:
        """See Engine."""
        self.optimizer.zero_grad(set_to_none=True)
        forget_statistics(self.model)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """See Engine."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro in batches:
            totals[0] += self._forward(micro).cross_entropy
            totals[1] += micro.targets / self.mesh.cp  # every context-parallel rank counts the whole rows
        if self.mesh.size > 1:
            dist.all_reduce(totals)
        return float(totals[0] / totals[1]) if totals[1] else math.nan

    @torch.no_grad()
    def token_losses(self, batches: Iterable[MicroBatch]) -> list[Tensor]:
        """See Engine."""
        return [self._forward(micro).per_token for micro in batches]

    def state(self) -> dict[str, Any]:
        """See Engine."""
        fresh = not self.optimizer.state
        model, optimizer = get_state_dict(self.model, self.optimizer)
        if fresh:  # torch has made a step of size zero for there to be a state, and counts it
            for entry in self.optimizer.state.values():
                entry["step"].zero_()
        return self.cut.in_state(self.cut.described, {"model": model, "optimizer": optimizer})

    def load_state(self, state: dict[str, Any]) -> None:
        """See Engine."""
        state = self.cut.in_state(self.cut.undescribed, state)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def models(self) -> list[LanguageModel]:
        """See Engine."""
        return [self.model]

    def memory(self) -> dict[str, int]:
        """See Engine."""
        weights = sum_of_bytes(self.model.parameters())
        state = (tensor for entry in self.optimizer.state.values() for tensor in entry.values())
        return {"weights": weights, "gradients": weights, "optimizer": sum_of_bytes(state)}

    def _forward(self, micro: MicroBatch) -> LossSums:
        trainer = self.config.trainer
        tokens, labels, positions = (
            x.to(self.device, non_blocking=True) for x in (micro.tokens, micro.labels, micro.positions)
        )
        share = tokens.shape[0] / trainer.global_batch  # of the micro-batch in the step
        seq = SequenceMeta(
            micro.layout,
            self.groups.cp,
            positions,
            micro.borders,
            self.strategies,
            side_loss_scale=share * self.mesh.size,
            samples=micro.samples,
            tasks=micro.tasks,
        )
        return self.parallel_model(tokens, labels, seq, trainer.loss_chunk, trainer.z_loss)

    def _settle_buckets(self) -> None:
        """Run one throw-away pass, so that every real step reduces gradients in the same buckets.

        DDP deals gradients to buckets anew after its first backward, and sums depend on a gradient's place in its bucket:
        without this, the first step after a resume would differ in the last bits from the same step of an undisturbed run.
        """
        length = 2 * self.mesh.cp
        layout = make_layout(self.config.parallel.layout, self.mesh.cp, length, ((0, length),))
        nothing = torch.zeros(1, layout.local_length, dtype=torch.int64)
        micro = MicroBatch(nothing, nothing, nothing, ((0, length),), layout, length, (0,), ((DocumentSpan(0, 0, 0),),))
        self._forward(micro).objective.backward()
        self.discard()

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP reduces once, with the last micro-batch; FSDP after each, which keeps its gradients sharded."""
        if not last and isinstance(self.parallel_model, nn.parallel.DistributedDataParallel):
            return self.parallel_model.no_sync()
        return contextlib.nullcontext()


def parallelize(
    model: LanguageModel, config: TrainConfig, mesh: ProcessMesh, device: torch.device, cut: CutParameters
) -> nn.Module:
    """Shard, allocate, initialise, wrap: in this order. Returns the module to call; `model` keeps the plain parameter names."""
    sharded = config.engine.data_parallel == "fsdp" and mesh.size > 1
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        cut.shard_over_copies()
        device_mesh = init_device_mesh(device.type, (mesh.size,))
        ignored = set(cut.parameters.values())
        for layer in model.layers:
            fully_shard(layer, mesh=device_mesh, ignored_params=ignored)
        fully_shard(model, mesh=device_mesh, ignored_params=ignored)
    model.to_empty(device=device)
    initialise(model, config.trainer.seed)
    if sharded or mesh.size == 1:
        return model
    cut.hide_from_ddp()
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
