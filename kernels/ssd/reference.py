"""The state-space recurrence token by token (Dao and Gu 2024, "Transformers are SSMs", eq. 2): the oracle of the fast forms."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd(
    x: Tensor,
    dt: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t, in whatever precision it is given.

    Shapes and meaning as in lctrain.kernels.ssd.chunked.ssd.
    """
    rows, tokens, heads, size = x.shape
    each = heads // B.shape[2]
    B, C = (t.repeat_interleave(each, dim=2) for t in (B, C))
    state = x.new_zeros(rows, heads, size, B.shape[-1]) if initial_state is None else initial_state
    steps = torch.ones_like(x[..., 0]) if dt is None else dt
    out = []
    for t in range(tokens):
        if resets is not None:
            state = torch.where(resets[:, t, None, None, None], torch.zeros_like(state), state)
        decay = (steps[:, t] * A).exp()[..., None, None]
        state = decay * state + (steps[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        out.append((state * C[:, t].unsqueeze(-2)).sum(-1))
    y = torch.stack(out, dim=1) if out else x.clone()
    return (y if D is None else y + D[:, None] * x), state
