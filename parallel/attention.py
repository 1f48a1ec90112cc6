"""Sequence-parallel attention for any model: shard q, k, v by a SequenceLayout and call one function."""

from __future__ import annotations

from torch import Tensor

from lctrain.parallel.executor import ScheduledAttention
from lctrain.parallel.group import SequenceGroup
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask
from lctrain.parallel.plan import make_plan


def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    mask: AttentionMask,
    group: SequenceGroup,
    strategy: str = "ring",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a sequence whose tokens are spread over the ranks of `group`.

    Args:
        q: [B, T, H, D], this rank's tokens (T = layout.local_length) in layout order; fp64, fp32, bf16 or fp16.
        k, v: [B, T, Hkv, D] with H a multiple of Hkv.
        mask: document borders per batch row (or one row for all) in global positions.
        strategy: see lctrain.parallel.strategies.
        scale: multiplies the scores; None means 1/sqrt(D).

    Returns:
        out [B, T, H, D] in q's dtype and the log-sum-exp [B, H, T] (fp32 or fp64, no gradient). Padding gets out 0, lse -inf.

    Raises:
        ValueError: shapes, layout, mask and group do not belong together; on every rank, before anything is sent.
    """
    _check(q, k, v, layout, mask, group)
    forward, backward = (make_plan(strategy, layout, mask, group.rank, way) for way in ("forward", "backward"))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ScheduledAttention.apply(q, k, v, forward, backward, group, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, mask: AttentionMask, group: SequenceGroup) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q [B, T, H, D] and k, v [B, T, Hkv, D] do not fit: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if layout.world_size != group.size:
        raise ValueError(f"layout is for {layout.world_size} ranks, the group has {group.size}")
    if q.shape[1] != layout.local_length:
        raise ValueError(f"each rank holds {layout.local_length} tokens of {layout}, got {q.shape[1]}")
    if len(mask.documents) not in (1, q.shape[0]):
        raise ValueError(f"mask has document borders for {len(mask.documents)} rows, the batch has {q.shape[0]}")
    longest = max(borders[-1] for borders in mask.documents)
    if longest > layout.length:
        raise ValueError(f"documents reach to position {longest}, beyond the layout's {layout.length} tokens")
