"""megatron-core's tensor-parallel linears and sequence-parallel mappings behind our layers' names, shapes and dtypes.

megatron's tensors are [tokens, batch, d] and its sequence mappings divide dimension 0 evenly; ours are [batch, tokens, d], of
any length. Weights may be wider than the activations (fp32 against bf16) and are cast for the product, as in
lctrain.models.layers. Imported only with tp > 1, by lctrain.models.tensor_parallel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from lctrain.adapters.megatron_cpu import let_mappings_run_on_cpu
from lctrain.models.layers import Linear
from lctrain.models.place import Place
from lctrain.parallel.group import RankGroup

let_mappings_run_on_cpu()


def _config(tp: int, sequence_parallel: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float32,
        use_cpu_initialization=True,  # on the current default device (meta), not on CUDA
        perform_initialization=False,  # lctrain.models.init does that
    )


def gather(group: RankGroup, x: Tensor, length: int) -> Tensor:
    """See tensor_parallel.gather_tokens."""
    whole = gather_from_sequence_parallel_region(x.transpose(0, 1), tensor_parallel_output_grad=True, group=group.process_group)
    return whole[:length].transpose(0, 1)


def reduce_scatter(group: RankGroup, x: Tensor) -> Tensor:
    """See tensor_parallel.sum_tokens."""
    tokens_first = _tokens_first(group, x)
    return reduce_scatter_to_sequence_parallel_region(tokens_first, group=group.process_group).transpose(0, 1)


def sum_gradient(group: RankGroup, weight: Tensor) -> Tensor:
    """See tensor_parallel.shared."""
    return copy_to_tensor_model_parallel_region(weight, group=group.process_group)


def _tokens_first(group: RankGroup, x: Tensor) -> Tensor:
    """[B, T, d] -> [T', B, d], with zeros up to the next multiple of the ranks."""
    padding = -x.shape[1] % group.size
    return F.pad(x, (0, 0, 0, padding)).transpose(0, 1) if padding else x.transpose(0, 1)


def _keep_only_parameters(linear: nn.Module) -> None:
    """megatron's linears put an empty `_extra_state` into state dicts, for Transformer Engine; ours hold parameters only."""
    linear._load_state_dict_pre_hooks.clear()


class ColumnLinear(ColumnParallelLinear):
    """See tensor_parallel.column_linear. The gather before it sums the gradient of x once for all that share x."""

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state
    residual = False

    def __init__(self, group: RankGroup, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__(
            d_in,
            d_out,
            config=_config(group.size, sequence_parallel=False),
            init_method=None,
            bias=bias,
            skip_bias_add=True,
            disable_grad_reduce=True,
            tp_group=group.process_group,
        )
        _keep_only_parameters(self)

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {"weight": Place(cuts={"tp": 0}), "bias": Place(cuts={"tp": 0})}

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out / tp]."""
        y, bias = super().forward(x)
        return y if bias is None else y + bias.to(y.dtype)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._forward_impl(input, weight.to(input.dtype), *args, **kwargs)


class RowLinear(RowParallelLinear):
    """See tensor_parallel.row_linear. The bias is whole on every rank and added to its own tokens."""

    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state
    residual = True

    def __init__(self, group: RankGroup, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__(
            d_in,
            d_out,
            config=_config(group.size, sequence_parallel=True),
            init_method=None,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=group.process_group,
        )
        self.group = group
        _keep_only_parameters(self)

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {"weight": Place(cuts={"tp": 1})}

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_in / tp] -> [B, S, d_out]."""
        y, _ = super().forward(_tokens_first(self.group, x))
        return self._with_bias(y.transpose(0, 1))

    def finish(self, partial: Tensor) -> Tensor:
        """[B, T, d_out], a product with this rank's part of the weight -> [B, S, d_out]."""
        return self._with_bias(reduce_scatter(self.group, partial))

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + sum_gradient(self.group, self.bias).to(y.dtype)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super()._forward_impl(input, weight.to(input.dtype), *args, **kwargs)


class SharedHeadsLinear(Linear):
    """See tensor_parallel.heads_linear: rank r forms head r * heads // tp. The number of heads must divide that of ranks."""

    def __init__(self, group: RankGroup, d_in: int, heads: int, head_dim: int, bias: bool) -> None:
        super().__init__(d_in, heads * head_dim, bias)
        assert group.size % heads == 0, (group.size, heads)
        self.group = group
        first = group.rank * heads // group.size * head_dim
        self._own = slice(first, first + head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., head_dim]."""
        weight = sum_gradient(self.group, self.weight)[self._own].to(x.dtype)
        bias = None if self.bias is None else sum_gradient(self.group, self.bias)[self._own].to(x.dtype)
        return F.linear(x, weight, bias)
