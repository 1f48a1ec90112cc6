"""Sequence-parallel attention for any model: shard q, k, v by a SequenceLayout and call one function."""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain.kernels.attention.fused import accumulation_dtype
from lctrain.parallel.exchange import HeadExchange, ToHeads, ToTokens
from lctrain.parallel.executor import ScheduledAttention
from lctrain.parallel.group import RankGroup
from lctrain.parallel.heads import split_heads
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.placement import Placement
from lctrain.parallel.plan import make_plan
from lctrain.parallel.strategy import Strategy


def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    mask: AttentionMask,
    group: RankGroup,
    strategy: str | Strategy = "ring",
    scale: float | None = None,
    sinks: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention over a sequence whose tokens are spread over the ranks of `group`.

    Args:
        q: [B, T, H, D], this rank's tokens (T = layout.local_length) in layout order; fp64, fp32, bf16 or fp16.
        k, v: [B, T, Hkv, D] with H a multiple of Hkv.
        mask: document borders per batch row (or one row for all) in global positions.
        strategy: a Strategy, or the name of one with its default degrees.
        scale: multiplies the scores; None means 1/sqrt(D).
        sinks: [H], a learned score per head that takes part in the softmax and has no value (Xiao et al. 2023; GPT-OSS). Each
            rank gets the gradient from its own part of the work: add it up over the ranks, as that of any replicated weight.
        need_lse: return the log-sum-exp; Ulysses saves a message without it.

    Returns:
        out [B, T, H, D] in q's dtype and the log-sum-exp [B, H, T] (fp32 or fp64, no gradient; sinks included), or None.
        Padding gets out 0 and, without sinks, lse -inf.

    Raises:
        ValueError: shapes, layout, mask, group and strategy do not fit; on every rank, before anything is sent.
    """
    _check(q, k, v, layout, mask, group, sinks)
    strategy = Strategy(strategy) if isinstance(strategy, str) else strategy
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    size = strategy.group_size(group.size, k.shape[2])
    if size == 1:
        return _scheduled(q, k, v, sinks, layout, mask, group, group.rank, strategy, scale)
    grouped = strategy.grouped(layout, k.shape[2])
    index = next(i for i, members in enumerate(grouped.groups) if group.rank in members)
    exchange = HeadExchange(group, grouped, index, split_heads(q.shape[2], k.shape[2], size))
    heads = slice(*exchange.split.q[exchange.me])
    q_heads, k_heads, v_heads = ToHeads.apply(q, k, v, exchange)
    if not exchange.split.is_uniform(exchange.me):
        serving = torch.tensor(exchange.split.kv_of_queries(exchange.me), device=q.device)
        k_heads, v_heads = k_heads.index_select(2, serving), v_heads.index_select(2, serving)
    if q_heads.shape[2]:
        between = group.across([members[exchange.me] for members in grouped.groups])
        own_sinks = None if sinks is None else sinks[heads]
        out, lse = _scheduled(q_heads, k_heads, v_heads, own_sinks, grouped, mask, between, index, strategy, scale)
    else:  # more ranks than heads: this one only takes part in the exchange
        wide = accumulation_dtype(q.dtype)
        out, lse = q_heads, q_heads.new_empty(q.shape[0], 0, q_heads.shape[1], dtype=wide)
    whole = ToTokens.apply(out, exchange)
    if not need_lse:
        return whole, None
    (lse,) = exchange.to_tokens([("lse", lse.transpose(1, 2).unsqueeze(-1), exchange.split.q)])
    return whole, lse.squeeze(-1).transpose(1, 2)


def _scheduled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    placement: Placement,
    mask: AttentionMask,
    group: RankGroup,
    rank: int,
    strategy: Strategy,
    scale: float,
) -> tuple[Tensor, Tensor]:
    name, node = strategy.schedule_name(), strategy.node_size(placement.world_size)
    plans = tuple(make_plan(name, placement, mask, rank, way, k.shape[2], node) for way in ("forward", "backward"))
    return ScheduledAttention.apply(q, k, v, sinks, plans, group, scale)


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, mask: AttentionMask, group: RankGroup, sinks: Tensor | None
) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q [B, T, H, D] and k, v [B, T, Hkv, D] do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks must have one entry per query head, [{q.shape[2]}], got {tuple(sinks.shape)}")
    if layout.world_size != group.size:
        raise ValueError(f"layout is for {layout.world_size} ranks, the group has {group.size}")
    if q.shape[1] != layout.local_length:
        raise ValueError(f"each rank holds {layout.local_length} tokens of {layout}, got {q.shape[1]}")
    if len(mask.documents) not in (1, q.shape[0]):
        raise ValueError(f"mask has document borders for {len(mask.documents)} rows, the batch has {q.shape[0]}")
    longest = max(borders[-1] for borders in mask.documents)
    if longest > layout.length:
        raise ValueError(f"documents reach to position {longest}, beyond the layout's {layout.length} tokens")
