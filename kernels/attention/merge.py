"""Merging partial attention results: the associative combine of online softmax.

(out, lse) over one set of keys and (out', lse') over a disjoint set combine to the result over both:
    lse'' = log(exp(lse) + exp(lse')),   out'' = out + sigmoid(lse' - lse) * (out' - out)
It is the same idea as lctrain.kernels.ssd.merge, which sums up stretches of a recurrence; this combine commutes, too.
The formula that most libraries use turns two empty rows (lse = -inf twice) into NaN; here they stay empty.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Fold (new_out, new_lse) into (out, lse) in place.

    Args:
        out, new_out: [B, S, H, D]; out in fp32 or fp64, new_out in any float dtype.
        lse, new_lse: [B, H, S]; -inf marks a row that has seen no key, whose out must be 0.
    """
    weight = torch.sigmoid(new_lse - lse).nan_to_num_(0.0)  # NaN only for -inf against -inf: nothing to add
    out.lerp_(new_out.to(out.dtype), weight.transpose(1, 2).unsqueeze(-1).to(out.dtype))
    torch.logaddexp(lse, new_lse.to(lse.dtype), out=lse)


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) after merging one more key per head that has the score sinks [H] and the value 0; new tensors."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out * (lse - total).exp().transpose(1, 2).unsqueeze(-1), total
