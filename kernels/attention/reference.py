"""Attention as written in the textbook: the oracle of every other kernel, in whatever precision it is given."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, live: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention over the live entries only.

    Args:
        q: [B, Sq, H, D]. k, v: [B, Sk, Hkv, D] with H a multiple of Hkv (query head h reads KV head h // (H / Hkv)).
        live: bool [Sq, Sk] or [B, Sq, Sk].
        scale: multiplies the scores; None means 1/sqrt(D).

    Returns:
        out [B, Sq, H, D] and the log-sum-exp of the scores, lse [B, H, Sq]. A row with no live entry gives out 0, lse -inf
        and no gradient.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    live = live if live.dim() == 3 else live[None]
    scores = scores.masked_fill(~live[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    some = live.any(dim=-1)[:, None]
    weights = torch.exp(scores - torch.where(some, lse, torch.zeros_like(lse))[..., None])
    weights = torch.where(live[:, None], weights, torch.zeros_like(weights))
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse
