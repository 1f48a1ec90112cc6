"""A stand-in for the `flash_attn` package on machines without its GPUs: the same private functions, on CPU.

Ring libraries import FlashAttention's private forward and backward, which need CUDA. `install()` puts a module of that name
into sys.modules whose functions have the signatures of flash-attn 2.7 and call torch's CPU flash operator, so that these
libraries run unmodified. Only what they use is there: no dropout, windows, softcap or ALiBi. Causal is aligned bottom-right,
as in FlashAttention.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lctrain.kernels.attention import fused
from lctrain.kernels.attention.band import Band

VERSION = "2.7.4"


def install() -> None:
    """Make `import flash_attn` find the stand-in, unless the real package is installed."""
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        return
    package, interface = (_module(name) for name in ("flash_attn", "flash_attn.flash_attn_interface"))
    for function in (_flash_attn_forward, _flash_attn_backward, _flash_attn_varlen_forward, _flash_attn_varlen_backward):
        setattr(interface, function.__name__, function)
    package.__dict__.update(__version__=VERSION, __path__=[], flash_attn_interface=interface, flash_attn_func=_flash_attn_func)
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    return module


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """q [B, Sq, H, D], k, v [B, Sk, Hkv, D] -> out like q, lse [B, H, Sq]."""
    _only_plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    out, lse, _ = fused.forward(q, k, v, _band(q.shape[1], k.shape[1], causal), softmax_scale)
    return out.to(q.dtype).contiguous(), lse.contiguous(), None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    """Writes into dq, dk, dv."""
    _only_plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    band = _band(q.shape[1], k.shape[1], causal)
    grads: Sequence[Tensor] | None = fused.backward_whole(dout, q, k, v, out, softmax_lse, band, softmax_scale)
    if grads is None:
        grads = [torch.zeros_like(x, dtype=fused.accumulation_dtype(q.dtype)) for x in (q, k, v)]
        fused.backward_(dout, q, k, v, out, softmax_lse, band, softmax_scale, grads)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        into.copy_(grad)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """Packed: q [Tq, H, D], k, v [Tk, Hkv, D] -> out like q, lse [H, Tq]."""
    plain = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    pieces = [
        _flash_attn_forward(q[rows][None], k[columns][None], v[columns][None], *plain)
        for rows, columns in _sequences(cu_seqlens_q, cu_seqlens_k)
    ]
    return torch.cat([out[0] for out, *_ in pieces]), torch.cat([lse[0] for _, lse, *_ in pieces], dim=1), None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    """Writes into dq, dk, dv."""
    plain = (dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    for rows, columns in _sequences(cu_seqlens_q, cu_seqlens_k):
        lse = softmax_lse[None, :, rows].contiguous()
        mine, theirs = (rows, (dout, q, out, dq)), (columns, (k, v, dk, dv))
        (dout_, q_, out_, dq_), (k_, v_, dk_, dv_) = ([x[at][None] for x in tensors] for at, tensors in (mine, theirs))
        _flash_attn_backward(dout_, q_, k_, v_, out_, lse, dq_, dk_, dv_, *plain)


def _flash_attn_func(*args: Any, **settings: Any) -> Tensor:
    """Imported by yunchang, but not called by its rings."""
    raise NotImplementedError("the stand-in for flash_attn has only what rings call")


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    rows, columns = ([slice(*pair) for pair in pairwise(cu.tolist())] for cu in (cu_seqlens_q, cu_seqlens_k))
    return list(zip(rows, columns, strict=True))


def _band(rows: int, columns: int, causal: bool) -> Band:
    band = Band(0, rows, 0, columns, None, columns - rows if causal else None).trim()
    assert band is not None
    return band


def _only_plain(dropout_p: float, left: int, right: int, softcap: float | None, alibi_slopes: Tensor | None) -> None:
    if dropout_p or softcap or alibi_slopes is not None or (left, right) not in ((-1, -1), (-1, 0)):
        raise NotImplementedError("the stand-in for flash_attn knows no dropout, window, softcap or ALiBi")
