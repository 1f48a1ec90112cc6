"""Linear and RMSNorm with fp32 weights that compute in the dtype of their input.

The optimizer's weights stay fp32; a layer fed with bf16 casts its weight for the product, so gradients reach fp32 weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.kernels.rms_norm.fused import rms_norm
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Family, Place
from lctrain.parallel.group import RankGroup


class Linear(nn.Module):
    """y = x W^T + b in x's dtype. `residual` marks a projection into the residual stream, which starts smaller."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def finish(self, product: Tensor) -> Tensor:
        """What remains of `forward` after the product with the weight, where that was formed elsewhere."""
        return product if self.bias is None else product + self.bias.to(product.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in fp32 (Zhang and Sennrich 2019).

    parallel: given where tensor-parallel ranks hold different tokens or heads: the weight's gradient is then summed over them.
    """

    def __init__(self, size: int, eps: float, parallel: ModelParallel | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.tp = parallel.tp if parallel is not None else RankGroup()

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {"weight": Place(Family.NORM)}

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dimension is `size`; same dtype out."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight: Tensor = self.weight
        if self.tp.size > 1:
            from lctrain.models.megatron_layers import sum_gradient

            weight = sum_gradient(self.tp, weight)
        weight = weight.to(x.dtype).to(wide)  # rounded as a sharded engine's bf16 weights are: layouts must agree
        return rms_norm(x, weight, self.eps)
