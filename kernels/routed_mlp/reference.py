"""Feed-forward networks on the rows that were routed to them, as a formula per network: the oracle of the blocked one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def routed_mlp(
    x: Tensor,
    ends: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: str,
    tokens: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """See kernels.routed_mlp.blocked."""
    rows = x if tokens is None else x[tokens]
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        own = rows[start:end]
        hidden = own @ up[expert].t()
        if activation == "swiglu":
            assert gate is not None
            g = own @ gate[expert].t()
            hidden = g * torch.sigmoid(g) * hidden
        else:
            hidden = F.gelu(hidden, approximate="tanh") if activation == "gelu" else F.relu(hidden).square()
        parts.append(hidden @ down[expert].t())
        start = end
    y = torch.cat([*parts, x.new_zeros(len(rows) - start, down.shape[1])])
    if tokens is None:
        return y
    assert weights is not None
    return x.new_zeros(len(x), down.shape[1]).index_add(0, tokens, y * weights[:, None])
