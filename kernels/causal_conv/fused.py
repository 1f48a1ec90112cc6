"""Causal depthwise convolution with SiLU over packed documents, token-major, keeping only its input for backward.

Four taps are four multiply-adds over [tokens, channels] as they lie in memory. torch's own convolution wants the channels first
and knows no documents. On a CPU a block of tokens at a time stays in the cache; backward forms the sum before SiLU again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 17
"""Numbers per block of tokens on a CPU."""

GPU_BLOCK = 1 << 25
"""The same on a GPU, where it is launches that must be few: 128 MiB in fp32."""


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, positions: Tensor | None = None, halo: Tensor | None = None
) -> Tensor:
    """silu(bias + sum_s weight[:, K-1-s] x_{t-s}) per channel: the last tap weighs the token itself, as in torch's conv1d.

    Args:
        x: [R, T, channels] in any float dtype; computed in fp32 (fp64 for fp64). T may be 0, or less than K.
        weight: [channels, K]. bias: [channels] or None.
        positions: int [R, T], tokens of the same document before each one (larger numbers than K - 1 are all the same):
            taps beyond a document's start are left out. None: all tokens and the halo are one document.
        halo: [R, K-1, channels], the tokens before the first; None: there are none, as zeros.

    Returns:
        [R, T, channels] in x's dtype.
    """
    return _CausalConv.apply(x, weight, bias, positions, halo)


class _Taps:
    """The inputs of a block of tokens, shifted tap by tap."""

    def __init__(self, x: Tensor, weight: Tensor, positions: Tensor | None, halo: Tensor | None) -> None:
        self.x, self.positions, self.count = x, positions, weight.shape[1]
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.weight = weight.to(self.dtype).t().contiguous()
        self.halo = x.new_zeros(x.shape[0], self.count - 1, x.shape[2]) if halo is None else halo

    def blocks(self) -> Iterator[tuple[int, int]]:
        """First token and end of every block, in order."""
        rows, tokens, channels = self.x.shape
        size = max(self.count, (GPU_BLOCK if self.x.is_cuda else BLOCK) // max(1, rows * channels))
        for start in range(0, tokens, size):
            yield start, min(start + size, tokens)

    def padded(self, start: int, end: int) -> Tensor:
        """Tokens [start - K + 1, end), [R, K - 1 + end - start, channels]."""
        reach = self.count - 1
        from_halo = max(0, reach - start)
        parts = [self.halo[:, reach - from_halo :]] if from_halo else []
        return torch.cat([t.to(self.dtype) for t in (*parts, self.x[:, start - reach + from_halo : end])], dim=1)

    def live(self, start: int, end: int, back: int) -> Tensor | None:
        """[R, end - start, 1] with 0 where the tap `back` tokens ago lies in another document; None: nowhere."""
        if self.positions is None or back == 0:
            return None
        return (self.positions[:, start:end, None] >= back).to(self.dtype)

    def sums(self, start: int, end: int, padded: Tensor, bias: Tensor | None) -> Tensor:
        """What SiLU is applied to."""
        reach, tokens = self.count - 1, end - start
        total = padded[:, reach:] * self.weight[reach]
        for back in range(1, self.count):
            tap, live = padded[:, reach - back : reach - back + tokens], self.live(start, end, back)
            total.addcmul_(tap if live is None else tap * live, self.weight[reach - back])
        return total if bias is None else total.add_(bias.to(self.dtype))


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, positions, halo):
        taps, y = _Taps(x, weight, positions, halo), torch.empty_like(x)
        for start, end in taps.blocks():
            y[:, start:end] = F.silu(taps.sums(start, end, taps.padded(start, end), bias), inplace=True)
        ctx.save_for_backward(x, weight, bias, positions, halo)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, positions, halo = ctx.saved_tensors
        taps = _Taps(x, weight, positions, halo)
        reach = taps.count - 1
        dweight, dbias = torch.zeros_like(taps.weight), taps.weight.new_zeros(x.shape[2])
        dx = torch.empty_like(x)
        # Gradient of the K - 1 tokens after the block, as far as later tokens have told.
        carried = taps.weight.new_zeros(x.shape[0], reach, x.shape[2])
        for start, end in reversed(list(taps.blocks())):
            padded, tokens = taps.padded(start, end), end - start
            slope = torch.ops.aten.silu_backward(dy[:, start:end].to(taps.dtype), taps.sums(start, end, padded, bias))
            dpadded = torch.zeros_like(padded)
            for back in range(taps.count):
                at = slice(reach - back, reach - back + tokens)
                live = taps.live(start, end, back)
                alive = slope if live is None else slope * live
                dpadded[:, at].addcmul_(alive, taps.weight[reach - back])
                dweight[reach - back] += (alive * padded[:, at]).sum((0, 1))
            dbias += slope.sum((0, 1))
            dpadded[:, tokens:] += carried
            carried = dpadded[:, :reach].clone()
            dx[:, start:end] = dpadded[:, reach:]
        dhalo = None if halo is None else carried.to(halo.dtype)
        return dx, dweight.t().to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None, dhalo
