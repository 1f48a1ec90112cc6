"""Output projection and cross-entropy in one, over chunks of tokens, so that no S x V matrix of logits ever exists.

Gradients are formed in the forward pass while a chunk's logits are at hand, and only scaled in backward. Logits, softmax
and the weight's gradient are fp32 whatever the dtype of the hidden states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import IGNORE


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk: int,
    z_weight: float = 0.0,
    group: RankGroup | None = None,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of next-token losses.

    Args:
        hidden: [N, d]. weight: [V, d]. labels: int64 [N], IGNORE where there is no target.
        chunk: tokens whose logits [chunk, V] exist at once.
        z_weight: adds z_weight * logsumexp(logits)^2 per target (Chowdhery et al. 2022).
        group: ranks that divide the vocabulary: weight is this rank's rows, those of the token ids from `first` on, hidden and
            labels are the same on all. Results are then equal on all ranks, and the gradient of hidden is this rank's part of
            a sum.

    Returns:
        The objective (sum over targets, with z-loss; differentiable), and without gradient the sum of the cross-entropies
        alone (fp64) and the loss of every token (fp32 [N], 0 where there is no target).
    """
    if not torch.is_grad_enabled():  # a parameter says that it needs a gradient even then, and forming it is half of the work
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, z_weight, group or RankGroup(), first)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, z_weight: float, group: RankGroup, first: int):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        matrix = weight.to(hidden.dtype)
        losses = hidden.new_zeros(len(hidden), dtype=wide)
        z_total = losses.new_zeros(())
        for start in range(0, len(hidden), chunk):
            at = slice(start, start + chunk)
            x, target = hidden[at], labels[at]
            valid = target != IGNORE
            logits = _wide_product(x, matrix.t())
            lse = logits.logsumexp(dim=-1)
            row = target - first
            here = valid & (row >= 0) & (row < len(weight))
            row = torch.where(here, row, 0).unsqueeze(1)
            picked = torch.where(here, logits.gather(1, row).squeeze(1), 0.0)
            if group.size > 1:
                parts = group.all_gather("loss", torch.stack((lse, picked)))
                lse, picked = parts[:, 0].logsumexp(dim=0), parts[:, 1].sum(dim=0)
            losses[at] = torch.where(valid, lse - picked, 0.0)
            z_total += torch.where(valid, lse.square(), 0.0).sum()
            if dhidden is None and dweight is None:
                continue
            # d objective / d logits, in the logits' own memory: softmax * (1 + 2 z lse) - onehot, 0 without a target
            slope = torch.where(valid, 1 + 2 * z_weight * lse, 0.0)
            dlogits = logits.sub_(lse.unsqueeze(1)).exp_().mul_(slope.unsqueeze(1))
            dlogits.scatter_add_(1, row, -here.to(wide).unsqueeze(1))
            dlogits = dlogits.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, matrix, out=dhidden[at])
            if dweight is not None:
                _add_wide_product(dweight, dlogits.t(), x)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        cross_entropy = losses.sum(dtype=torch.float64)
        ctx.mark_non_differentiable(cross_entropy, losses)
        return cross_entropy.to(wide) + z_weight * z_total, cross_entropy, losses

    @staticmethod
    def backward(ctx, upstream: Tensor, _cross_entropy: Tensor, _losses: Tensor):
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * upstream.to(dhidden.dtype)
        if dweight is not None:
            dweight = (dweight * upstream).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 (or wider) result: the tensor cores' own accumulator on CUDA, an fp32 product elsewhere."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _add_wide_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _wide_product(a, b)
