"""Attention over bands with torch's own fused kernels, accumulating partial results; CPU and CUDA.

Both directions take the rows' *global* out and log-sum-exp where they exist, so that results over any cutting of the keys
add up to the whole. The fused operators are private to torch; their quirks are handled here and nowhere else:
  CPU   a fully masked row returns lse 0 instead of -inf (bands have no such row); causal is aligned top-left; the additive
        mask must have the dtype of q.
  CUDA  half precision uses FlashAttention, whose window argument takes any band at once, aligned bottom-right;
        fp32 uses the memory-efficient kernel, which knows no grouped heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lctrain.kernels.attention.band import Band
from lctrain.kernels.attention.blocks import Block, cut
from lctrain.kernels.attention.merge import merge_

_aten = torch.ops.aten

LARGE = 2**18
"""Live entries per head from which a call on CPU takes so long (a millisecond) that several calls take no longer than one."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for fp32 and below, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def portions(q: Tensor, k: Tensor, band: Band) -> list[tuple[slice, slice]]:
    """Query heads and the key/value heads that they read, as many as should go through `forward` or `backward_` at a time.

    On CPU a call needs room for its results, and for half precision for copies of its inputs, in proportion to its heads. As
    many key/value heads as there are threads, batch rows counted, keep all threads busy; large bands go in such portions. Where
    one thread has nobody to keep busy, query heads go one by one.
    """
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    together = heads
    if not q.is_cuda and band.entries >= LARGE:
        together = min(heads, -(-torch.get_num_threads() // q.shape[0]))
        if torch.get_num_threads() == 1:
            return [(slice(head, head + 1), slice(head // group, head // group + 1)) for head in range(q.shape[2])]
    firsts = range(0, heads, together)
    return [(slice(at * group, (at + together) * group), slice(at, at + together)) for at in firsts]


def forward(q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float, partial: bool = False) -> tuple[Tensor, Tensor, slice]:
    """Attention of one trimmed band.

    Args:
        q: [B, Sq, H, D]; k, v: [B, Sk, Hkv, D], last dimension contiguous. The band's indices count in these.
        partial: the result will be merged with others. The CPU kernel rounds its output to the inputs' dtype, and rounding
            before and after merging would err more than one process does: parts of a half-precision result are therefore
            computed in fp32 there. CUDA's kernels offer no such choice.

    Returns:
        out [B, rows, H, D] (fp32 if it took several blocks, else q's dtype or fp32), lse fp32 [B, H, rows] (fp64 for fp64),
        and the slice of query rows they belong to.
    """
    rows = slice(band.q0, band.q1)
    blocks = _blocks(band, q)
    if (partial or len(blocks) > 1) and not q.is_cuda:
        wide = accumulation_dtype(q.dtype)
        columns = slice(band.k0, band.k1)
        q, k, v = q[:, rows].to(wide), k[:, columns].to(wide), v[:, columns].to(wide)
        blocks = [block.moved(-band.q0, -band.k0) for block in blocks]
        band = band.moved(-band.q0, -band.k0)
    if len(blocks) == 1:
        out, lse = _forward_block(q, k, v, blocks[0], scale)
        return out, lse, rows
    count = band.q1 - band.q0
    out = q.new_zeros(q.shape[0], count, *q.shape[2:], dtype=accumulation_dtype(q.dtype))
    lse = out.new_full((q.shape[0], q.shape[2], count), float("-inf"))
    for block in blocks:
        part, part_lse = _forward_block(q, k, v, block, scale)
        at = slice(block.band.q0 - band.q0, block.band.q1 - band.q0)
        merge_(out[:, at], lse[:, :, at], part, part_lse)
    return out, lse, rows


@torch.no_grad()
def backward_(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float, into: Sequence[Tensor]
) -> None:
    """Add one trimmed band's gradients to `into` = (dq, dk, dv).

    Args:
        dout, q, out: [B, Sq, H, D] in one dtype; k, v: [B, Sk, Hkv, D]; lse: [B, H, Sq]. out and lse are the rows' final ones.
        into: accumulators shaped like q, k, v, of any float dtype (fp32 keeps the sum exact).

    On CPU the parts of a half-precision gradient are computed in fp32, as in `forward`.
    """
    rows, columns = slice(band.q0, band.q1), slice(band.k0, band.k1)
    dq, dk, dv = into[0][:, rows], into[1][:, columns], into[2][:, columns]
    dout, q, out, lse = dout[:, rows], q[:, rows], out[:, rows], lse[:, :, rows]
    k, v, band = k[:, columns], v[:, columns], band.moved(-band.q0, -band.k0)
    if not q.is_cuda:
        dout, q, k, v, out = (x.to(accumulation_dtype(q.dtype)) for x in (dout, q, k, v, out))
    for block in _blocks(band, q):
        rows, columns = slice(block.band.q0, block.band.q1), slice(block.band.k0, block.band.k1)
        parts = _backward_block(dout, q, k, v, out, lse, block, scale)
        dq[:, rows] += parts[0]
        dk[:, columns] += parts[1]
        dv[:, columns] += parts[2]


def backward_whole(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(dq, dk, dv) straight from the kernel if one call does it all; None where several parts must be added up."""
    blocks = _blocks(band, q)
    if len(blocks) > 1 or (band.q1 - band.q0, band.k1 - band.k0) != (q.shape[1], k.shape[1]):
        return None
    return _backward_block(dout, q, k, v, out, lse, blocks[0], scale)


def _blocks(band: Band, q: Tensor) -> list[Block]:
    return [Block(band, causal=False)] if _takes_any_band(q) else cut(band)


def _takes_any_band(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


def _views(block: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    band = block.band
    return q[:, band.q0 : band.q1], k[:, band.k0 : band.k1], v[:, band.k0 : band.k1]


def _forward_block(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _views(block, q, k, v)
    if _takes_any_band(q):
        sizes, window = (q.shape[1], k.shape[1]), _flash_window(block.band)
        out, lse, *_ = _aten._flash_attention_forward(
            q, k, v, None, None, *sizes, 0.0, window[1] == 0 and window[0] < 0, False,
            scale=scale, window_size_left=window[0], window_size_right=window[1],
        )  # fmt: skip
        return out, lse
    mask = _additive_mask(block, q.dtype, q.device)
    if q.is_cuda:
        k, v = _expand_heads(k, q), _expand_heads(v, q)
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), _expand_mask(mask, q), True, 0.0, block.causal, scale=scale
        )
        return out.transpose(1, 2), lse[..., : q.shape[1]]
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, block.causal, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2), lse


def _backward_block(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = slice(block.band.q0, block.band.q1)
    dout, out, lse = dout[:, rows], out[:, rows], lse[:, :, rows]
    q, k, v = _views(block, q, k, v)
    if _takes_any_band(q):
        sizes, window = (q.shape[1], k.shape[1]), _flash_window(block.band)
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state of a dropout that there is not
        return _aten._flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, *sizes, 0.0, window[1] == 0 and window[0] < 0, unused, unused,
            scale=scale, window_size_left=window[0], window_size_right=window[1],
        )  # fmt: skip
    mask = _additive_mask(block, q.dtype, q.device)
    if q.is_cuda:
        heads = k.shape[2]
        k, v = _expand_heads(k, q), _expand_heads(v, q)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            dout.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), _expand_mask(mask, q),
            out.transpose(1, 2), _aligned(lse), seed, seed, 0.0, [True, True, True, False], block.causal, scale=scale,
        )  # fmt: skip
        dk, dv = (x.transpose(1, 2).unflatten(2, (heads, -1)).sum(3) for x in (dk, dv))
        return dq.transpose(1, 2), dk, dv
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout.transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), out.transpose(1, 2), lse, 0.0,
        block.causal, attn_mask=mask, scale=scale,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _additive_mask(block: Block, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if block.causal or block.band.full:
        return None
    band = block.band
    corner = band.q0 - band.k0
    lo = None if band.lo is None else band.lo + corner
    hi = None if band.hi is None else band.hi + corner
    return _mask(band.q1 - band.q0, band.k1 - band.k0, lo, hi, dtype, device)


@lru_cache(maxsize=16)  # of 4 MB at most each
def _mask(rows: int, columns: int, lo: int | None, hi: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    live = Band(0, rows, 0, columns, lo, hi).live(device)
    return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill_(~live, float("-inf"))


def _flash_window(band: Band) -> tuple[int, int]:
    """FlashAttention's (left, right) window, which it counts from the bottom-right diagonal; -1 leaves a side open."""
    bottom_right = (band.k1 - band.k0) - (band.q1 - band.q0)
    corner = band.q0 - band.k0
    left = -1 if band.lo is None else bottom_right - (band.lo + corner)
    right = -1 if band.hi is None else (band.hi + corner) - bottom_right
    return left, right


def _expand_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _expand_mask(mask: Tensor | None, q: Tensor) -> Tensor | None:
    if mask is None:
        return None
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 16))  # the kernel wants rows aligned to 16 entries
    return padded[:, : mask.shape[1]].expand(q.shape[0], q.shape[2], *mask.shape)


def _aligned(lse: Tensor) -> Tensor:
    """The memory-efficient backward reads lse in rows padded to a multiple of 32."""
    return torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf")).contiguous()
