"""Sequence-parallel attention for any model: shard q, k, v by a SequenceLayout and call one function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lctrain.kernels.attention.fused import accumulation_dtype
from lctrain.parallel.exchange import HeadExchange, ToHeads, ToTokens
from lctrain.parallel.executor import ScheduledAttention
from lctrain.parallel.group import RankGroup
from lctrain.parallel.heads import split_heads
from lctrain.parallel.keys import Expand, HeadKeys, Keys, LatentKeys
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.placement import Placement
from lctrain.parallel.plan import AttentionPlan, make_plan
from lctrain.parallel.schedule import Direction
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
        return _scheduled(q, sinks, layout, mask, group, group.rank, strategy, scale, k.shape[2], HeadKeys, k, v)
    grouped = strategy.grouped(layout, k.shape[2])
    index = next(i for i, members in enumerate(grouped.groups) if group.rank in members)
    exchange = HeadExchange(group, grouped, index, split_heads(q.shape[2], k.shape[2], size))
    heads = slice(*exchange.split.q[exchange.me])
    q_heads, k_heads, v_heads = ToHeads.apply(exchange, q, k, v)
    if not exchange.split.is_uniform(exchange.me):
        serving = torch.tensor(exchange.split.kv_of_queries(exchange.me), device=q.device)
        k_heads, v_heads = k_heads.index_select(2, serving), v_heads.index_select(2, serving)
    if q_heads.shape[2]:
        between = group.across([members[exchange.me] for members in grouped.groups])
        own_sinks = None if sinks is None else sinks[heads]
        out, lse = _scheduled(
            q_heads, own_sinks, grouped, mask, between, index, strategy, scale, k_heads.shape[2], HeadKeys, k_heads, v_heads
        )
    else:  # more ranks than heads: this one only takes part in the exchange, but the sinks' gradient must exist everywhere
        wide = accumulation_dtype(q.dtype)
        out, lse = (
            q_heads if sinks is None else q_heads + 0 * sinks.sum(),
            q_heads.new_empty(q.shape[0], 0, q_heads.shape[1], dtype=wide),
        )
    whole = ToTokens.apply(out, exchange)
    if not need_lse:
        return whole, None
    (lse,) = exchange.to_tokens([("lse", lse.transpose(1, 2).unsqueeze(-1), exchange.split.q)])
    return whole, lse.squeeze(-1).transpose(1, 2)


def sequence_parallel_latent_attention(
    q: Tensor,
    latent: Tensor,
    weight: Tensor,
    expand: Expand,
    *,
    layout: SequenceLayout,
    mask: AttentionMask,
    group: RankGroup,
    strategy: str | Strategy = "ring",
    scale: float,
) -> Tensor:
    """As sequence_parallel_attention, but what travels instead of keys and values is a latent that they are computed from.

    Every rank expands what it needs, chunk by chunk, and again in backward, so no keys or values are kept between the two.
    Where heads are exchanged for sequence (ulysses, usp), the latents are gathered and a rank expands its own heads only.

    Args:
        q: [B, T, H, D], this rank's tokens.
        latent: [B, T, C].
        weight: [H * n, L], rows of one head together. Each rank gets the gradient from its own part of the work: add it up
            over the ranks, as that of any replicated weight.
        expand: (latent, rows of weight for some heads) -> k, v [B, tokens, those heads, D].

    Returns:
        out [B, T, H, D] in q's dtype.
    """
    _check(q, q, q, layout, mask, group, None)
    heads = q.shape[2]
    if latent.shape[:2] != q.shape[:2] or weight.shape[0] % heads or latent.dtype != q.dtype or weight.dtype != q.dtype:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, latent {tuple(latent.shape)} {latent.dtype} and the weight of {heads} heads"
            f" {tuple(weight.shape)} {weight.dtype} do not fit"
        )
    strategy = Strategy(strategy) if isinstance(strategy, str) else strategy
    make_keys = partial(LatentKeys, expand=expand)
    size = strategy.group_size(group.size, heads)
    if size == 1:
        out, _ = _scheduled(q, None, layout, mask, group, group.rank, strategy, scale, 1, make_keys, latent, weight)
        return out
    grouped = strategy.grouped(layout, heads)
    index = next(i for i, members in enumerate(grouped.groups) if group.rank in members)
    split = AttentionShape(q.shape[0], heads, heads, q.shape[3], q.dtype, latent.shape[-1]).split(size)
    exchange = HeadExchange(group, grouped, index, split)
    q_heads, latents = ToHeads.apply(exchange, q, latent.unsqueeze(2))
    if q_heads.shape[2]:
        between = group.across([members[exchange.me] for members in grouped.groups])
        own = weight.unflatten(0, (heads, -1))[slice(*split.q[exchange.me])].flatten(0, 1)
        sources = latents.squeeze(2), own
        out, _ = _scheduled(q_heads, None, grouped, mask, between, index, strategy, scale, 1, make_keys, *sources)
    else:  # more ranks than heads: nothing to compute, but the weight's gradient must exist (and be 0) on every rank
        out = q_heads + 0 * weight.sum()
    return ToTokens.apply(out, exchange)


def prepare_attention(
    layout: SequenceLayout,
    mask: AttentionMask,
    rank: int,
    strategy: Strategy,
    n_heads: int,
    n_kv_heads: int,
    *,
    latent: bool = False,
    gradients: bool = True,
) -> tuple[AttentionPlan, ...]:
    """The plans of `rank` that attention over heads (or latents) will ask for, made now.

    Calls find them for as long as somebody holds them; a call whose plans nobody has made makes them itself.

    Args:
        n_heads, n_kv_heads: of the tensors that the call gets; for latents n_heads is given twice.
        gradients: make those for backward too.
    """
    size = strategy.group_size(layout.world_size, n_kv_heads)
    if size == 1:
        return _plans(strategy, layout, mask, rank, 1 if latent else n_kv_heads, gradients)
    grouped = strategy.grouped(layout, n_kv_heads)
    index, members = next((i, members) for i, members in enumerate(grouped.groups) if rank in members)
    split, me = split_heads(n_heads, n_kv_heads, size), members.index(rank)
    heads, kv_heads = (end - first for first, end in (split.q[me], split.kv[me]))
    if not heads:
        return ()
    kv_heads = 1 if latent else kv_heads if split.is_uniform(me) else heads
    return _plans(strategy, grouped, mask, index, kv_heads, gradients)


def _scheduled(
    q: Tensor,
    sinks: Tensor | None,
    placement: Placement,
    mask: AttentionMask,
    group: RankGroup,
    rank: int,
    strategy: Strategy,
    scale: float,
    kv_heads: int,
    make_keys: Callable[..., Keys],
    *sources: Tensor,
) -> tuple[Tensor, Tensor]:
    plans = _plans(strategy, placement, mask, rank, kv_heads, torch.is_grad_enabled())
    return ScheduledAttention.apply(q, sinks, plans, group, scale, make_keys, *sources)


def _plans(
    strategy: Strategy, placement: Placement, mask: AttentionMask, rank: int, kv_heads: int, gradients: bool
) -> tuple[AttentionPlan, ...]:
    name, node = strategy.schedule_name(), strategy.node_size(placement.world_size)
    ways: tuple[Direction, ...] = ("forward", "backward") if gradients else ("forward",)
    return tuple(make_plan(name, placement, mask, rank, way, kv_heads, node) for way in ways)


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
