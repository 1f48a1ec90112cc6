"""megatron-core's optimizer, and its state as whole tensors by parameter.

The distributed optimizer divides gradients, fp32 main weights and moments evenly over the data- and context-parallel ranks, as
ranges of flat buffers that do not keep to the borders of parameters. `tensors` puts a parameter's ranges together, one
parameter at a time, in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from lctrain.config.schema import TrainConfig
from lctrain.models.place import Family, Place
from lctrain.optim import sum_of_bytes

MOMENTS = ("exp_avg", "exp_avg_sq")


class Held(NamedTuple):
    """What this rank holds of a parameter's main weights: elements start to stop of the flattened parameter."""

    start: int
    stop: int
    main: Tensor
    state: dict[str, Tensor]


def mark_parameters(parameters: dict[str, nn.Parameter], places: dict[str, Place], tied_copy: bool, tied: bool) -> None:
    """Set the attributes by which megatron-core tells parameters apart, before it wraps them.

    allreduce: False sends gradients over the expert- instead of the dense data-parallel ranks. tensor_model_parallel: every
    rank has another part, so that all count in the gradient norm, not only tp rank 0's. shared: a copy that does not count.
    shared_embedding: in a bucket of its own, so that both copies are divided alike. no_weight_decay is ours, for a ParamKey.
    """
    for name, parameter in parameters.items():
        place = places[name]
        expert = place.family is Family.EXPERT
        parameter.allreduce = not expert  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = expert or "tp" in place.cuts  # type: ignore[attr-defined]
        parameter.no_weight_decay = not place.decays(parameter)  # type: ignore[attr-defined]
        if tied and name == "embedding":
            parameter.shared_embedding = True  # type: ignore[attr-defined]
            parameter.shared = tied_copy  # type: ignore[attr-defined]


class Optimizer:
    """AdamW over the parameters of this rank's pipeline stage.

    parameters: full name -> parameter, as megatron's DDP holds them.
    """

    def __init__(
        self,
        config: TrainConfig,
        chunks: list[DistributedDataParallel],
        parameters: dict[str, nn.Parameter],
        collection: ProcessGroupCollection,
    ) -> None:
        self.config, self.parameters, self._collection = config.optim, parameters, collection
        settings = OptimizerConfig(
            optimizer="adam",
            lr=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            adam_beta1=config.optim.beta1,
            adam_beta2=config.optim.beta2,
            adam_eps=config.optim.eps,
            clip_grad=0.0,  # update() clips, after the loop has seen the norm
            bf16=config.engine.dtype == "bf16",
            use_distributed_optimizer=config.engine.distributed_optimizer,
        )
        # torch's AdamW even where Transformer Engine or Apex has one: the same arithmetic and state in all engines
        with patch("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", True):
            self.megatron = get_megatron_optimizer(
                settings,
                chunks,
                config_overrides={ParamKey(attr="no_weight_decay"): {"wd_mult": 0.0}},
                use_gloo_process_groups=False,
                pg_collection=collection,
            )
        self._held = dict(self._find_held())
        for held in self._held.values():
            if not held.state:
                held.state["step"] = torch.zeros((), dtype=torch.float32)
                held.state.update({moment: torch.zeros_like(held.main) for moment in MOMENTS})

    def grad_norm(self) -> float:
        """Take over the reduced gradients; their global norm, every parameter counted once. Collective."""
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def update(self, lr: float, grad_norm: float) -> None:
        """Clip by the global norm, step, and make the model's weights follow the main ones. Collective."""
        for optimizer in self.megatron.chained_optimizers:
            if optimizer.is_stub_optimizer:
                continue
            if self.config.clip_norm is not None and optimizer.get_parameters():
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self.config.clip_norm, grad_norm)
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, self.config.weight_decay * group["wd_mult"]
        self.megatron.step_with_ready_grads()

    def discard(self) -> None:
        """Forget the gradients of the main weights."""
        self.megatron.zero_grad()

    def memory(self) -> int:
        """Bytes of moments and of main weights that are not the model's own."""
        own = {parameter.untyped_storage()._cdata for parameter in self.parameters.values()}
        mains = [held.main for held in self._held.values() if held.main.untyped_storage()._cdata not in own]
        return sum_of_bytes(mains) + sum_of_bytes(x for held in self._held.values() for x in held.state.values())

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Of every parameter the fp32 main weight and the AdamW state, each in the shape of this rank's part. Collective."""
        for name, parameter in self.parameters.items():
            held = self._held.get(name)
            if held is not None and held.main.numel() == parameter.numel() and not self._divided(parameter):
                yield name, {key: x.detach().view(parameter.shape) for key, x in _named(held)} | {"step": held.state["step"]}
                continue
            flat = torch.zeros(1 + len(MOMENTS), parameter.numel(), device=parameter.device)
            step = torch.zeros(1, device=parameter.device)
            if held is not None:
                step += held.state["step"].to(step.device)
                for row, (_, part) in zip(flat, _named(held), strict=True):
                    row[held.start : held.stop] = part
            dist.all_reduce(flat, group=self._divided(parameter))  # zeros but for one rank: a gather of uneven parts
            dist.all_reduce(step, op=dist.ReduceOp.MAX, group=self._divided(parameter))
            shaped = zip(("main", *MOMENTS), flat.cpu().view(-1, *parameter.shape), strict=True)
            yield name, {**dict(shaped), "step": step.cpu()[0]}

    @torch.no_grad()
    def set(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave for a parameter, into main weights, moments and model weights."""
        parameter, held = self.parameters[name], self._held.get(name)
        parameter.copy_(tensors["main"])
        if held is None:
            return
        held.state["step"].copy_(tensors["step"])
        for key, part in _named(held):
            if part.data_ptr() != tensors[key].data_ptr():
                part.copy_(tensors[key].reshape(-1)[held.start : held.stop].view(part.shape))

    @torch.no_grad()
    def set_main(self, name: str, values: Tensor) -> None:
        """Give a parameter's main weights values finer than the model's own."""
        held = self._held.get(name)
        if held is not None:
            held.main.copy_(values.reshape(-1)[held.start : held.stop].view(held.main.shape))

    def _divided(self, parameter: nn.Parameter) -> dist.ProcessGroup | None:
        """The ranks over which a parameter's state is divided, if it is."""
        if not any(isinstance(optimizer, DistributedOptimizer) for optimizer in self.megatron.chained_optimizers):
            return None
        return self._collection.dp_cp if parameter.allreduce else self._collection.expt_dp  # type: ignore[attr-defined]

    def _find_held(self) -> Iterator[tuple[str, Held]]:
        names = {parameter: name for name, parameter in self.parameters.items()}
        for optimizer in self.megatron.chained_optimizers:
            if optimizer.is_stub_optimizer:
                continue
            state = optimizer.optimizer.state
            if not isinstance(optimizer, DistributedOptimizer):
                mains = {getattr(parameter, "main_param", parameter): parameter for parameter in names}
                for group in optimizer.param_groups:
                    for main in group["params"]:
                        yield names[mains[main]], Held(0, main.numel(), main, state[main])
                continue
            # megatron's own index of groups is wrong where a group has both fp32 and bf16 parameters: pair them anew
            pairs = [
                (parameter, main)
                for models, shards in (
                    (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
                    (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
                )
                for model_group, shard_group in zip(models, shards, strict=True)
                for parameter, main in zip(model_group, shard_group, strict=True)
            ]
            for parameter, main in pairs:
                span = optimizer._get_model_param_range_map(parameter)["param"]
                yield names[parameter], Held(span.start, span.end, main, state[main])


def _named(held: Held) -> Iterator[tuple[str, Tensor]]:
    yield "main", held.main
    for moment in MOMENTS:
        yield moment, held.state[moment]
