"""Matrix products of groups of rows: torch's grouped operator where it is safe, a loop over groups elsewhere.

What the operator does not take, seen with torch 2.11 and 2.13: fp64; rows that do not begin at multiples of 16 bytes; on CUDA,
by its documentation, anything but bf16 and devices before Ampere. In fp32 on meta and fake tensors it raises although it could
tell the shape. It leaves rows past the last group uninitialised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_ALIGNMENT = 16
"""Bytes."""

_FEW_ROWS = 4
"""With fewer rows, CPU products in fp32 take other instructions and round otherwise: a token's result would depend on how many
other tokens go to its expert, and through them on other documents. (Seen with MKL on one thread: from 4 rows on, every bit is
the same. Several threads share rows out, and the last bits then follow the number of rows all the same.)"""


def rows_times(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Every row times the matrix of its group.

    Args:
        x: [M, K]. matrices: [E, K, N] of the same dtype, each row- or column-major. ends: int32 [E], rising; group e has the
            rows from ends[e-1] (0 for the first) to ends[e].

    Returns:
        [M, N]; rows from ends[-1] on are 0.
    """
    shape = (x.shape[0], matrices.shape[2])
    if _shape_only(x) or not x.shape[0]:
        return x.new_empty(shape)
    safe = _safe(x) and _safe(matrices)
    y = F.grouped_mm(x, matrices, offs=ends) if safe else x.new_empty(shape)
    if x.device.type != "cpu" and safe:  # without waiting for the device
        return y.masked_fill_((torch.arange(len(y), device=y.device) >= ends[-1])[:, None], 0)
    ranges = _ranges(ends)
    for group, (start, end) in enumerate(ranges):
        if 0 < end - start < _FEW_ROWS:
            padded = F.pad(x[start:end], (0, 0, 0, _FEW_ROWS - (end - start)))
            y[start:end] = (padded @ matrices[group])[: end - start]
        elif not safe:
            torch.mm(x[start:end], matrices[group], out=y[start:end])
    y[ranges[-1][1] :] = 0
    return y


def outer_products(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """a^T b of every group: a [M, N], b [M, K] -> [E, N, K], 0 for a group without rows; see rows_times."""
    shape = (len(ends), a.shape[1], b.shape[1])
    if _shape_only(a):
        return a.new_empty(shape)
    if not a.shape[0]:
        return a.new_zeros(shape)
    if not (_safe(a) and _safe(b)):
        products = a.new_zeros(shape)
        for group, (start, end) in enumerate(_ranges(ends)):
            if end > start:
                torch.mm(a[start:end].t(), b[start:end], out=products[group])
        return products
    products = F.grouped_mm(a.t(), b, offs=ends)
    if a.device.type != "cpu":  # not promised for products over no rows; the CPU operator was seen to give 0
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        products.masked_fill_(empty[:, None, None], 0)
    return products


def _shape_only(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


def _safe(x: Tensor) -> bool:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.data_ptr() % _ALIGNMENT:
        return False
    if x.is_cuda and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return False
    if 1 not in x.stride()[-2:]:
        return False
    return all(stride * x.element_size() % _ALIGNMENT == 0 for stride in x.stride() if stride != 1)


def _ranges(ends: Tensor) -> list[tuple[int, int]]:
    found = ends.tolist()
    return list(zip([0, *found], found, strict=False))
