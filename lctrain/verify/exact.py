"""What one process gets: in fp64 from the textbook formula, and in bf16 from torch's own kernel, which sets the bar there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lctrain.kernels.attention import reference
from lctrain.parallel.mask import AttentionMask
from lctrain.verify.problem import Inputs


class Results(NamedTuple):
    """out, dq [B, T, H, D], dk, dv [B, T, Hkv, D], lse [B, H, T], dsinks [H] or None."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    lse: Tensor
    dsinks: Tensor | None


def exact(inputs: Inputs, mask: AttentionMask) -> Results:
    """Results in fp64. A sink is one more key per head, with the given score and the value 0."""
    q, k, v, dout = (x.double() for x in inputs[:4])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    live = mask.live(q.shape[1]).expand(len(q), -1, -1)
    out, lse = reference.attention(*leaves, live)
    sinks = None
    if inputs.sinks is not None:
        sinks = inputs.sinks.double().requires_grad_()
        total = torch.logaddexp(lse, sinks[:, None])
        out, lse = out * (lse - total).exp().transpose(1, 2).unsqueeze(-1), total
    out.backward(dout)
    grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    return Results(out.detach(), *grads, lse.detach(), None if sinks is None else sinks.grad)


def one_process(inputs: Inputs, mask: AttentionMask) -> Results:
    """Results of torch's scaled_dot_product_attention in the inputs' dtype; sinks as a key of zeros with a bias on its score."""
    bias = torch.zeros(1, 1, 1, 1, dtype=inputs.q.dtype).masked_fill(~mask.live(inputs.q.shape[1])[:, None], float("-inf"))
    empty = bias.isinf().all(dim=-1, keepdim=True)  # padding: the kernel would return NaN
    bias = bias.masked_fill(empty, 0)
    q, k, v, dout = (x.transpose(1, 2) for x in inputs[:4])
    if inputs.sinks is not None:
        bias = torch.cat(
            [bias.expand(-1, q.shape[1], -1, -1), inputs.sinks[:, None, None].expand(len(bias), -1, q.shape[2], 1)], -1
        )
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    leaves = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    with torch.no_grad():
        _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            leaves[0],
            *(x.repeat_interleave(group, dim=1) for x in leaves[1:]),
            attn_mask=bias.expand(len(q), q.shape[1], -1, -1),
        )
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=bias, enable_gqa=True)
    dout = dout.masked_fill(empty, 0)
    out.backward(dout)
    dq, dk, dv = (leaf.grad.transpose(1, 2)[:, : inputs.q.shape[1]] for leaf in leaves)
    out = out.detach().masked_fill(empty, 0)
    dsinks = None
    if inputs.sinks is not None:
        share = (inputs.sinks.float()[:, None] - lse).exp().masked_fill(empty.squeeze(-1), 0)
        dsinks = -(share * (dout.float() * out.float()).sum(-1)).sum((0, 2))
    return Results(out.transpose(1, 2), dq, dk, dv, lse.masked_fill(empty.squeeze(-1), float("-inf")), dsinks)
