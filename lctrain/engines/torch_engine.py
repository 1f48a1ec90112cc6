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
from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.devices import DTYPES
from lctrain.engines.base import StepResult
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel, LossSums
from lctrain.optim import global_grad_norm, make_adamw, scale_gradients
from lctrain.parallel.deal import make_layout
from lctrain.parallel.group import RankGroup
from lctrain.parallel.mesh import ProcessMesh
from lctrain.parallel.sequence import SequenceMeta


class TorchEngine:
    """See lctrain.engines.base.Engine.

    Gradient contract: every rank's backward starts from (sum of its token losses) * size / (targets of the global batch), and
    DDP and FSDP average over all size = dp * cp ranks, so the result is the gradient of the mean over all targets, whatever
    each rank holds.
    """

    def __init__(self, config: TrainConfig, mesh: ProcessMesh, group: RankGroup, device: torch.device) -> None:
        self.config, self.mesh, self.group, self.device = config, mesh, group, device
        self.strategies = attention_strategies(config, device)
        self.model = build_model(config, device)
        self.parallel_model = parallelize(self.model, config, mesh, device)
        self.optimizer = make_adamw(self.model, config.optim)
        if isinstance(self.parallel_model, nn.parallel.DistributedDataParallel):
            self._settle_buckets()

    def train_step(self, batch: StepBatch, targets: int, lr: float) -> StepResult:
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
        grad_norm = float(global_grad_norm(self.model.parameters()))
        loss = float(total) / max(1, targets)
        problem = None
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            problem = self._describe_problem(batch, losses, loss, grad_norm)
        else:
            self._update(grad_norm, lr)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, problem)

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

    def state(self) -> dict[str, Any]:
        """See Engine."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state(self, state: dict[str, Any]) -> None:
        """See Engine."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def _forward(self, micro: MicroBatch) -> LossSums:
        trainer = self.config.trainer
        tokens, labels, positions = (
            x.to(self.device, non_blocking=True) for x in (micro.tokens, micro.labels, micro.positions)
        )
        seq = SequenceMeta(micro.layout, self.group, positions, micro.borders, self.strategies)
        return self.parallel_model(tokens, labels, seq, trainer.loss_chunk, trainer.z_loss)

    def _settle_buckets(self) -> None:
        """Run one throw-away pass, so that every real step reduces gradients in the same buckets.

        DDP deals gradients to buckets anew after its first backward, and sums depend on a gradient's place in its bucket:
        without this, the first step after a resume would differ in the last bits from the same step of an undisturbed run.
        """
        length = 2 * self.mesh.cp
        layout = make_layout(self.config.parallel.layout, self.mesh.cp, length, ((0, length),))
        nothing = torch.zeros(1, layout.local_length, dtype=torch.int64)
        micro = MicroBatch(nothing, nothing, nothing, ((0, length),), layout, length, (0,), ((),))
        self._forward(micro).objective.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """DDP reduces once, with the last micro-batch; FSDP after each, which keeps its gradients sharded."""
        if not last and isinstance(self.parallel_model, nn.parallel.DistributedDataParallel):
            return self.parallel_model.no_sync()
        return contextlib.nullcontext()

    def _update(self, grad_norm: float, lr: float) -> None:
        clip = self.config.optim.clip_norm
        if clip is not None and grad_norm > clip:
            scale_gradients(self.model.parameters(), clip / grad_norm)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        self.optimizer.step()

    def _describe_problem(self, batch: StepBatch, losses: list[Tensor], loss: float, grad_norm: float) -> str:
        """Name the ranks, samples and documents whose loss is not finite, or all if only the gradient is not, which is a sum.

        Collective: all ranks see the same problem.
        """
        mine = [
            (math.isfinite(float(value)), f"rank {self.mesh.rank}, sample {sample}, {_name(spans)}")
            for micro, value in zip(batch.micro_batches, losses, strict=True)
            for sample, spans in zip(micro.samples, micro.spans, strict=True)
        ]
        everyone: list[list[tuple[bool, str]]] = [mine]
        if self.mesh.size > 1:
            everyone = [[] for _ in range(self.mesh.size)]
            dist.all_gather_object(everyone, mine)
        all_finite = all(finite for places in everyone for finite, _ in places)
        places = [place for places in everyone for finite, place in places if all_finite or not finite]
        named = "; ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
        what = f"loss {loss:g}, gradient norm {grad_norm:g}"
        if all_finite:
            return f"{what} over {named}: every loss is finite, the gradient overflowed"
        return f"{what}: first not finite on {named}"


def build_model(config: TrainConfig, device: torch.device) -> LanguageModel:
    """The model without storage (meta device), so that sharding can come before any memory is taken."""
    with torch.device("meta"):
        return LanguageModel(
            config.model, DTYPES[config.engine.dtype], checkpointing=config.engine.activation_checkpointing == "layer"
        )


def parallelize(model: LanguageModel, config: TrainConfig, mesh: ProcessMesh, device: torch.device) -> nn.Module:
    """Shard, allocate, initialise, wrap: in this order. Returns the module to call; `model` keeps the plain parameter names."""
    sharded = config.engine.data_parallel == "fsdp" and mesh.size > 1
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device_mesh = init_device_mesh(device.type, (mesh.size,))
        for layer in model.layers:
            fully_shard(layer, mesh=device_mesh)
        fully_shard(model, mesh=device_mesh)
    model.to_empty(device=device)
    initialise(model, config.trainer.seed)
    if sharded or mesh.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def _name(spans: tuple[Any, ...]) -> str:
    shown = ", ".join(f"{span.document} of corpus {span.corpus}" for span in spans[:3])
    return f"document{'s' if len(spans) > 1 else ''} {shown}" + (f" and {len(spans) - 3} more" if len(spans) > 3 else "")
