"""What a rank holds of a parameter's fp32 weights, gradient and AdamW moments, under each ZeRO stage.

ZeRO 1 and 2 lay the parameters of an optimizer group end to end and cut that into one piece per rank, so a rank holds a run of
elements of some parameters and nothing of others. ZeRO-3 cuts every parameter by itself. Stage 0 cuts nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lctrain.optim import sum_of_bytes

MOMENTS = ("exp_avg", "exp_avg_sq")
TENSORS = ("weights", *MOMENTS)


class Fragment(NamedTuple):
    """`size` elements of a flattened parameter from `start` on; they lie in `flat`, a tensor of the optimizer, at `offset`."""

    flat: Tensor
    offset: int
    start: int
    size: int


class Shards:
    """Stage 0: every rank holds whole parameters.

    engine: DeepSpeed's. partitioned: whether what the ranks hold of a parameter is disjoint.
    """

    partitioned = False

    def __init__(self, engine: Any) -> None:
        self.optimizer, self.adamw = engine.optimizer, engine.basic_optimizer
        for flat in self._flat_tensors():
            self.adamw.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Which elements of a parameter this rank holds; None for none."""
        return Fragment(parameter, 0, 0, parameter.numel())

    def tensors(self, fragment: Fragment) -> dict[str, Tensor]:
        """The fragment's weights, exp_avg and exp_avg_sq, fp32 [size], to be read or written in place."""
        state = self.adamw.state[fragment.flat]
        whole = {"weights": fragment.flat.data, **{key: state[key] for key in MOMENTS}}
        return {key: tensor.view(-1).narrow(0, fragment.offset, fragment.size) for key, tensor in whole.items()}

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The fragment's averaged gradient, fp32 [size], between backward and step; None if this rank holds none."""
        return None if parameter.grad is None else parameter.grad.view(-1)

    def memory(self, parameters: list[nn.Parameter]) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state, as Engine.memory gives them."""
        weights = sum_of_bytes(parameters)
        return {"weights": weights, "gradients": weights, "optimizer": self._state_bytes()}

    @property
    def steps(self) -> list[Tensor]:
        """AdamW's counts of steps, scalars, all equal."""
        return [state["step"] for state in self.adamw.state.values()]

    def settle(self) -> None:
        """To be called once weights were written: makes the model compute with them. Collective."""

    def tell_norm(self, norm: Tensor) -> None:
        """What DeepSpeed's next step shall take for the gradient norm; -1 makes it drop the gradients and update nothing."""

    def _state_bytes(self) -> int:
        return sum_of_bytes(tensor for state in self.adamw.state.values() for tensor in state.values())

    def _flat_tensors(self) -> list[Tensor]:
        return [parameter for group in self.adamw.param_groups for parameter in group["params"]]


class FlatShards(Shards):
    """Stages 1 and 2."""

    partitioned = True

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(flat, here.start, there.start, there.numel)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        fragment = self.fragment(parameter)
        if fragment is None:
            return None
        index: int = parameter._index_in_param_group  # type: ignore[attr-defined]
        gradient: Tensor = parameter._hp_mapping.get_lp_grad_fragment(index).view(-1)  # type: ignore[attr-defined]
        assert gradient.numel() == fragment.size, (gradient.shape, fragment.size)
        return gradient

    def memory(self, parameters: list[nn.Parameter]) -> dict[str, int]:
        weights, masters = sum_of_bytes(parameters), sum_of_bytes(self._flat_tensors())
        gradients = masters if self.optimizer.partition_gradients else weights
        return {"weights": weights, "gradients": gradients, "optimizer": masters + self._state_bytes()}

    def settle(self) -> None:
        self.optimizer.update_lp_params()

    def tell_norm(self, norm: Tensor) -> None:
        self.optimizer.scaled_global_norm = lambda norm_type=2: norm

    def _flat_tensors(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)


class ParameterShards(Shards):
    """Stage 3."""

    partitioned = True

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        optimizer = self.optimizer
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = padded * optimizer._get_param_partition_rank(parameter)
        size = min(padded, parameter.ds_numel - start)  # type: ignore[attr-defined]
        return Fragment(optimizer.fp32_partitioned_groups_flat[group], offset, start, size) if size > 0 else None

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        fragment = self.fragment(parameter)
        if fragment is None:
            return None
        padded: Tensor = self.optimizer.get_local_fp32_grad_for_param(parameter)
        return padded[: fragment.size]

    def memory(self, parameters: list[nn.Parameter]) -> dict[str, int]:
        masters = sum_of_bytes(self._flat_tensors())
        weights = sum_of_bytes(parameter.ds_tensor for parameter in parameters)  # type: ignore[attr-defined]
        return {"weights": weights, "gradients": masters, "optimizer": masters + self._state_bytes()}

    def settle(self) -> None:
        optimizer = self.optimizer
        optimizer._partition_all_parameters()  # or parameters that are still gathered would keep their old values
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones that every rank keeps whole
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def tell_norm(self, norm: Tensor) -> None:
        self.optimizer._get_norm_groups = lambda: [norm]

    def _flat_tensors(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)


def shards_of(engine: Any) -> Shards:
    """The shards of DeepSpeed's engine."""
    kinds: dict[int, type[Shards]] = {0: Shards, 1: FlatShards, 2: FlatShards, 3: ParameterShards}
    return kinds[int(engine.zero_optimization_stage())](engine)
