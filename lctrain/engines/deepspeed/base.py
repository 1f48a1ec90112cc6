"""What the ZeRO engine and the pipeline engine have in common: gradient norm, clipping, steps, and state by parameter."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lctrain.attention_choice import attention_strategies
from lctrain.config.schema import TrainConfig
from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.engines.base import StepResult
from lctrain.engines.deepspeed.parts import Part, Parts
from lctrain.engines.deepspeed.shards import MOMENTS, TENSORS, shards_of
from lctrain.engines.problem import describe_problem
from lctrain.models.build import build_model
from lctrain.models.model import LanguageModel
from lctrain.models.moe.stats import forget_statistics, gather_statistics, update_biases
from lctrain.models.place import Family, Place, parameter_places
from lctrain.optim import checkpoint_groups, scale_gradients, sum_of_squares
from lctrain.parallel.mesh import MeshGroups, ProcessMesh
from lctrain.parallel.sequence import SequenceMeta


class DeepSpeedCommon:
    """Weights are fp32 for DeepSpeed, which is told of no other dtype; layers cast, as under the torch engine.

    Gradient contract: every rank's backward starts from (sum of its token losses) * size / (targets of the global batch), with
    size = dp * cp. DeepSpeed averages over those ranks and has no factor of its own. Clipping is ours, by the norm over all
    parameters, each counted once.

    held: what this rank computes with: the whole model or a pipeline stage of it, parameters under their names in the whole.
    """

    def __init__(
        self, config: TrainConfig, mesh: ProcessMesh, groups: MeshGroups, device: torch.device, held: LanguageModel
    ) -> None:
        """held: not sharded yet, with or without storage."""
        self.config, self.mesh, self.groups, self.device, self.held = config, mesh, groups, device, held
        self.strategies = attention_strategies(config, device)
        self.size = mesh.dp * mesh.cp
        self.joiner = Parts(mesh, groups, held.parallel, device)
        places = parameter_places(held)
        self.parts = {name: Part(x.shape, places.get(name, Place())) for name, x in held.state_dict().items()}
        self.grad_norm = 0.0
        self._factor = 1.0

    def adopt(self, engine: Any) -> None:
        """Take over what deepspeed.initialize returned."""
        self.engine, self.shards = engine, shards_of(engine)
        self.parameters: dict[str, nn.Parameter] = dict(self.held.named_parameters())
        self.buffers = {name: buffer for name, buffer in self.held.named_buffers() if name in self.parts}
        # Under every stage AdamW is the last to see a gradient, and sees each element on the rank that updates it.
        engine.basic_optimizer.register_step_pre_hook(self._clip)

    def sequence(self, micro: MicroBatch) -> SequenceMeta:
        """What layers are told of a micro-batch."""
        share = micro.tokens.shape[0] / self.config.trainer.global_batch  # of the micro-batch in the step
        return SequenceMeta(
            micro.layout,
            self.groups.cp,
            micro.positions.to(self.device, non_blocking=True),
            micro.borders,
            self.strategies,
            side_loss_scale=share * self.size,
            samples=micro.samples,
            tasks=micro.tasks,
        )

    def result(self, batch: StepBatch, targets: int, losses: list[Tensor]) -> StepResult:
        """The outcome of a backward pass. losses: cross-entropies of the micro-batches, where they count. Collective."""
        total = torch.stack([loss.double() for loss in losses]).sum()
        if self.mesh.size > 1:
            dist.all_reduce(total)
        self.grad_norm = float(self._gradient_norm())
        loss = float(total) / max(1, targets)
        problem = None
        if not math.isfinite(loss) or not math.isfinite(self.grad_norm):
            problem = describe_problem(self.mesh, batch, losses, loss, self.grad_norm)
        return StepResult(loss, self.grad_norm, problem, self.statistics())

    def statistics(self) -> dict[str, Any]:
        """Metrics of the mixtures. Collective."""
        return gather_statistics(self.held, self.held.parallel)

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """See Engine."""
        found = {}
        for name, parameter in self.parameters.items():
            part, gradient = self.parts[name], self.shards.gradient(parameter)
            whole = self.joiner.whole(part, self._joined(name, gradient))
            if self.mesh.rank % self.mesh.stage_size == 0:
                found[name] = whole.to("cpu", copy=True)  # clipping scales in place
        if self.mesh.pp == 1:
            return found
        stages: list[Any] | None = [None] * self.mesh.size if self.mesh.rank == 0 else None
        dist.gather_object(found, stages)
        return {name: gradient for stage in stages or () for name, gradient in stage.items()}

    def update(self, lr: float) -> None:
        """See Engine."""
        clip = self.config.optim.clip_norm
        self._factor = clip / self.grad_norm if clip is not None and self.grad_norm > clip else 1.0
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = lr
        self.shards.tell_norm(torch.tensor(self.grad_norm, device=self.device))
        self.step()
        update_biases(self.held)
        forget_statistics(self.held)

    def discard(self) -> None:
        """See Engine."""
        if self.shards.partitioned:
            self.shards.tell_norm(torch.tensor(-1.0, device=self.device))
            self.step()
        else:
            self.engine.zero_grad()
        forget_statistics(self.held)

    def step(self) -> None:
        """Let DeepSpeed step."""
        self.engine.step()

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        """See Engine."""
        step = self.shards.steps[0]
        model: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.parameters.items():
            fragment = self.shards.fragment(parameter)
            held = {} if fragment is None else self.shards.tensors(fragment)
            rows = {key: self.joiner.described(self.parts[name], self._joined(name, held.get(key))) for key in TENSORS}
            model[name] = rows["weights"]
            moments[name] = {"step": step.clone(), **{key: rows[key] for key in MOMENTS}}
        for name, buffer in self.buffers.items():
            model[name] = self.joiner.described(self.parts[name], buffer)
        groups = checkpoint_groups(build_model(self.config), self.config.optim)
        return {"model": model, "optimizer": {"state": moments, "param_groups": groups}}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """See Engine."""
        model, moments = state["model"], state["optimizer"]["state"]
        for name, parameter in self.parameters.items():
            fragment = self.shards.fragment(parameter)
            held = {} if fragment is None else self.shards.tensors(fragment)
            for key in TENSORS:
                whole = self.joiner.undescribed(self.parts[name], model[name] if key == "weights" else moments[name][key])
                if fragment is not None:
                    held[key].copy_(whole.view(-1)[fragment.start : fragment.start + fragment.size])
        for step in self.shards.steps:
            step.copy_(next(iter(moments.values()))["step"])
        for name, buffer in self.buffers.items():
            buffer.copy_(self.joiner.undescribed(self.parts[name], model[name]))
        self.shards.settle()

    def models(self) -> list[LanguageModel]:
        """See Engine."""
        return [self.held]

    def memory(self) -> dict[str, int]:
        """See Engine."""
        return self.shards.memory(list(self.parameters.values()))

    def _joined(self, name: str, values: Tensor | None) -> Tensor:
        """A part from `values`, this rank's elements of it or of its gradient; zeros where nobody has any. Collective."""
        part = self.parts[name]
        if self.shards.partitioned:
            fragment = self.shards.fragment(self.parameters[name])
            return self.joiner.joined(part, values, 0 if fragment is None else fragment.start)
        return torch.zeros(part.shape, device=self.device) if values is None else values.view(part.shape)

    def _gradient_norm(self) -> Tensor:
        """L2 norm over all gradients, fp64 scalar, every parameter counted once, equal on all ranks. Collective."""
        spread: dict[tuple[bool, tuple[str, ...]], list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            part, gradient = self.parts[name], self.shards.gradient(parameter)
            own = spread.setdefault((part.place.family is Family.EXPERT, tuple(self.joiner.cuts(part))), [])
            if gradient is not None and self.counts(name):
                own.append(gradient)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for (expert, cuts), gradients in spread.items():
            squares = sum_of_squares(gradients).to(self.device)
            if self.shards.partitioned:
                (self.groups.edp if expert else self.groups.dp_cp).all_reduce("grad_norm", squares)
            for dimension in cuts:
                self.held.parallel.group(dimension).all_reduce("grad_norm", squares)
            total += squares
        return self.groups.pp.all_reduce("grad_norm", total).sqrt()

    def counts(self, name: str) -> bool:
        """Whether this pipeline stage is the one that counts a parameter that several hold."""
        return True

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._factor != 1.0:
            scale_gradients((parameter for group in optimizer.param_groups for parameter in group["params"]), self._factor)
