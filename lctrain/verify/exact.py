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
    live = mask.live(inputs.q.shape[1]).expand(len(inputs.q), -1, -1)
    group = inputs.q.shape[2] // inputs.k.shape[2]
    rows = []
    for row in range(len(inputs.q)):  # head by head: textbook scores of all would be slow to allocate
        heads = range(inputs.k.shape[2])
        parts = [_exact(inputs, live[row], row, slice(kv * group, (kv + 1) * group), slice(kv, kv + 1)) for kv in heads]
        rows.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
    out, dq, dk, dv, lse, dsinks = (torch.stack(tensors) for tensors in zip(*rows, strict=True))
    out, dq, dk, dv = (x.transpose(1, 2) for x in (out, dq, dk, dv))
    return Results(out, dq, dk, dv, lse, None if inputs.sinks is None else dsinks.sum(0))


def _exact(inputs: Inputs, live: Tensor, row: int, q_heads: slice, kv_heads: slice) -> tuple[Tensor, ...]:
    """out, dq, dk, dv [heads, T, D], lse [heads, T], dsinks [heads] of one sequence and one KV head."""
    picked = zip(inputs[:4], (q_heads, kv_heads, kv_heads, q_heads), strict=True)
    q, k, v, dout = (x[row : row + 1, :, heads].double() for x, heads in picked)
    sinks = torch.zeros(q.shape[2]) if inputs.sinks is None else inputs.sinks[q_heads]
    leaves = [x.requires_grad_() for x in (q, k, v, sinks.double())]
    out, lse = reference.attention(q, k, v, live)
    if inputs.sinks is not None:
        total = torch.logaddexp(lse, leaves[3][:, None])
        out, lse = out * (lse - total).exp().transpose(1, 2).unsqueeze(-1), total
    grads = torch.autograd.grad(out, leaves, dout, materialize_grads=True)
    return (*(x.detach()[0].transpose(0, 1) for x in (out, *grads[:3])), lse.detach()[0], grads[3])


def one_process(inputs: Inputs, mask: AttentionMask) -> Results:
    """Results of torch's scaled_dot_product_attention in the inputs' dtype; a sink is a key of zeros with a bias."""
    tokens, heads = inputs.q.shape[1:3]
    bias = torch.zeros((), dtype=inputs.q.dtype).masked_fill(~mask.live(tokens)[:, None], float("-inf"))
    empty = bias.isinf().all(dim=-1, keepdim=True)  # padding: the kernel would return NaN
    bias = bias.masked_fill(empty, 0)
    q, k, v, dout = (x.transpose(1, 2) for x in inputs[:4])
    if inputs.sinks is not None:
        sinks = inputs.sinks[:, None, None].expand(len(bias), -1, tokens, 1)
        bias = torch.cat([bias.expand(-1, heads, -1, -1), sinks], dim=-1)
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
    q, k, v = leaves = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout.masked_fill(empty, 0))
    with torch.no_grad():  # the operator behind it, for the log-sum-exp
        every = bias.expand(len(q), heads, -1, -1)
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=every)
    dq, dk, dv = (grad.transpose(1, 2)[:, :tokens] for grad in (dq, dk, dv))
    out, empty_rows = out.detach().masked_fill(empty, 0), empty.squeeze(-1)
    dsinks = None
    if inputs.sinks is not None:
        share = (inputs.sinks.float()[:, None] - lse).exp().masked_fill(empty_rows, 0)
        dsinks = -(share * (dout.float() * out.float()).sum(-1)).sum((0, 2)).to(inputs.sinks.dtype)
    return Results(out.transpose(1, 2), dq, dk, dv, lse.masked_fill(empty_rows, float("-inf")), dsinks)
