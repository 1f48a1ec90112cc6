"""The executor: runs any checked schedule over a process group as one differentiable operation.

Transfers of a step are started before its tiles are computed and waited for when they are due. Partial results are kept in
fp32 (fp64 for fp64 inputs) in buffers of their own, never in a buffer that is received into again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lctrain.kernels.attention import fused
from lctrain.kernels.attention.merge import add_sinks, merge_
from lctrain.parallel.courier import Courier
from lctrain.parallel.group import RankGroup
from lctrain.parallel.keys import Keys
from lctrain.parallel.mask import RowBand
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.plan import AttentionPlan, Side, Work
from lctrain.parallel.schedule import Chunk, Item


class ScheduledAttention(torch.autograd.Function):
    """(q, sinks, keys and values) of one rank -> (out, lse); lse carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        sinks: Tensor | None,
        plans: tuple[AttentionPlan, ...],
        group: RankGroup,
        scale: float,
        make_keys: Callable[..., Keys],
        *sources: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """q: [B, T, H, D], T = placement.local_length; sinks: [H]; make_keys(*sources, wide=accumulation dtype) -> Keys.

        plans: for forward and, where gradients are wanted, backward. Returns out like q, lse [B, H, T].
        """
        whole = plans[0].whole
        keys = make_keys(*sources, wide=fused.accumulation_dtype(q.dtype))
        if whole is not None:
            out, lse, _ = fused.forward(q, *keys.own(slice(None)), whole.band, scale)
        else:
            out, lse = _Forward(q, keys, plans[0], group, scale).run()
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, out, lse, sinks, *sources)
        ctx.plan, ctx.group, ctx.scale, ctx.make_keys = plans[-1], group, scale, make_keys
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, sinks and sources; every other argument has none."""
        q, out, lse, sinks, *sources = ctx.saved_tensors
        keys = ctx.make_keys(*sources, wide=fused.accumulation_dtype(q.dtype))
        dout = upstream[0].to(q.dtype)
        dq = whole = None
        if ctx.plan.whole is not None:
            k, v = keys.own(slice(None))
            found = fused.backward_whole(dout, q, k, v, out, lse, ctx.plan.whole.band, ctx.scale)
            if found is not None:
                dq, whole = found[0], (found[1], found[2])
        if dq is None:
            dq = _Backward(dout, q, keys, out, lse, ctx.plan, ctx.group, ctx.scale).run()
        grads = [grad.to(x.dtype) for grad, x in zip(keys.gradients(whole), sources, strict=True)]
        dsinks = None
        if sinks is not None:  # a sink is a key with value 0: its score's gradient is -p * delta
            share = (sinks.to(lse.dtype)[:, None] - lse).exp()
            dsinks = -(share * _delta(dout, out).transpose(1, 2)).sum(dim=(0, 2)).to(sinks.dtype)
        return (dq.to(q.dtype), dsinks, None, None, None, None, *grads)


class _Run:
    """What both directions share: this rank's tensors, the courier, and the walk through the steps."""

    def __init__(self, q: Tensor, keys: Keys, plan: AttentionPlan, group: RankGroup, scale: float) -> None:
        self.q, self.kv, self.plan, self.scale = q, keys, plan, scale
        self.wide = fused.accumulation_dtype(q.dtype)
        shape = AttentionShape(q.shape[0], q.shape[2], keys.n_kv_heads, q.shape[3], q.dtype, keys.latent)
        self.split = shape.split(plan.slices)
        self.size = plan.placement.chunk_length
        self.courier = Courier(plan, group, shape, self.pack, self.fold, q.device)

    def walk(self) -> None:
        for index, step in enumerate(self.plan.steps):
            self.courier.start(index)
            for work in step.work:
                self.compute(work)
            self.courier.finish(index)
        del self.courier  # it holds what it calls, this object: their tensors would live until Python looked for such circles

    def compute(self, work: Work) -> None:
        raise NotImplementedError

    def pack(self, item: Item) -> tuple[Tensor, ...]:
        """A contiguous copy of one of this rank's own chunks, token by token, as it travels."""
        raise NotImplementedError

    def fold(self, item: Item, arrived: tuple[Tensor, ...]) -> None:
        """Add partial results for one of this rank's own chunks to its results."""
        raise NotImplementedError

    def rows(self, chunk: Chunk) -> slice:
        return slice(chunk.part * self.size, (chunk.part + 1) * self.size)

    def heads(self, kind: str, part: int) -> slice:
        return slice(*(self.split.q if kind in ("q", "out", "dq") else self.split.kv)[part])

    def keys(self, side: Side, part: int) -> tuple[Tensor, Tensor, int]:
        """k, v [B, tokens, heads, D] and the local index of their first token."""
        if side.owner == self.plan.rank:
            return (*self.kv.own(self.heads("kv", part)), 0)
        (joint,), start = self.courier.copy("kv", side, part)
        return (*self.kv.unpack(joint), start)

    def pack_kv(self, item: Item) -> tuple[Tensor, ...]:
        return (self.kv.pack(self.rows(item.chunk), self.heads("kv", item.heads)),)


class _Forward(_Run):
    def run(self) -> tuple[Tensor, Tensor]:
        batch, tokens, heads, _ = self.q.shape
        self.out = torch.zeros_like(self.q, dtype=self.wide)
        self.lse = self.out.new_full((batch, heads, tokens), float("-inf"))
        self.walk()
        return self.out, self.lse

    def compute(self, work: Work) -> None:
        k, v, k_start = self.keys(work.k, work.heads)
        if work.q.owner == self.plan.rank:
            at = self.heads("q", work.heads)
            q, q_start, out, lse = self.q[:, :, at], 0, self.out[:, :, at], self.lse[:, at]
        else:
            (packed,), q_start = self.courier.copy("q", work.q, work.heads)
            q = packed.transpose(0, 1)
            out = torch.zeros_like(packed, dtype=self.wide).transpose(0, 1)
            lse = out.new_full((out.shape[0], out.shape[2], out.shape[1]), float("-inf"))
        for part in work.bands:
            band = part.band.moved(-q_start, -k_start)
            q_rows, k_rows, v_rows, out_rows, lse_rows = _of_rows(part, q, k, v, out, lse)
            for own, their in fused.portions(q_rows, k_rows, band):
                inputs = q_rows[:, :, own], k_rows[:, :, their], v_rows[:, :, their]
                new_out, new_lse, at = fused.forward(*inputs, band, self.scale, partial=True)
                merge_(out_rows[:, at, own], lse_rows[:, own, at], new_out, new_lse)
        if work.q.owner != self.plan.rank:
            partial = (out.transpose(0, 1).to(self.q.dtype), lse.permute(2, 0, 1))
            self.courier.add("out", work.q, work.heads, partial, q_start)

    def pack(self, item: Item) -> tuple[Tensor, ...]:
        if item.kind == "kv":
            return self.pack_kv(item)
        return (self.q[:, self.rows(item.chunk), self.heads("q", item.heads)].transpose(0, 1).contiguous(),)

    def fold(self, item: Item, arrived: tuple[Tensor, ...]) -> None:
        rows, heads = self.rows(item.chunk), self.heads("out", item.heads)
        out, lse = arrived[0].transpose(0, 1), arrived[1].permute(1, 2, 0)
        merge_(self.out[:, rows, heads], self.lse[:, heads, rows], out, lse)


class _Queries(NamedTuple):
    """Queries with what their gradient needs: q, dout, out [B, tokens, H, D], lse [B, H, tokens]."""

    q: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor


class _Backward(_Run):
    def __init__(
        self,
        dout: Tensor,
        q: Tensor,
        keys: Keys,
        out: Tensor,
        lse: Tensor,
        plan: AttentionPlan,
        group: RankGroup,
        scale: float,
    ) -> None:
        super().__init__(q, keys, plan, group, scale)
        self.own = _Queries(q, dout, out, lse)

    def run(self) -> Tensor:
        """The gradient of the queries; those of the keys are with them."""
        self.dq = torch.zeros_like(self.q, dtype=self.wide)
        self.walk()
        return self.dq

    def compute(self, work: Work) -> None:
        k, v, k_start = self.keys(work.k, work.heads)
        queries, q_start = self.queries(work)
        rank = self.plan.rank
        if work.q.owner == rank:
            dq = self.dq[:, :, self.heads("dq", work.heads)]
        else:
            dq = torch.zeros_like(queries.q.transpose(0, 1), dtype=self.wide, memory_format=torch.contiguous_format).transpose(
                0, 1
            )
        if work.k.owner == rank:
            dk, dv = self.kv.own_gradients(self.heads("dkv", work.heads))
        else:
            (came,), _ = self.courier.copy("kv", work.k, work.heads)
            dk, dv, homeward = self.kv.gradients_of(came, k)
        for part in work.bands:
            q, dout, out, lse, dq_rows, *others = _of_rows(part, *queries, dq, k, v, dk, dv)
            band = part.band.moved(-q_start, -k_start)
            for own, their in fused.portions(q, others[0], band):
                k_part, v_part, *into = (x[:, :, their] for x in others)
                mine = dout[:, :, own], q[:, :, own], k_part, v_part, out[:, :, own], lse[:, own]
                fused.backward_(*mine, band, self.scale, (dq_rows[:, :, own], *into))
        if work.q.owner != rank:
            self.courier.add("dq", work.q, work.heads, (dq.transpose(0, 1),), q_start)
        if work.k.owner != rank:
            self.courier.add("dkv", work.k, work.heads, (homeward(),), k_start)

    def queries(self, work: Work) -> tuple[_Queries, int]:
        """The queries of some work and the local index of their first token."""
        if work.q.owner == self.plan.rank:
            at = self.heads("q", work.heads)
            q, dout, out, lse = self.own
            return _Queries(q[:, :, at], dout[:, :, at], out[:, :, at], lse[:, at]), 0
        (joint, stats), start = self.courier.copy("q", work.q, work.heads)
        q, dout = _unpack(joint)
        lse, delta = stats[:, :, 0].permute(1, 2, 0).contiguous(), stats[:, :, 1].transpose(0, 1)
        # The kernel takes out and forms sum(dout * out) itself; any tensor with the right sum will do instead of sending out.
        wide = dout.to(self.wide)
        norm = wide.square().sum(dim=-1)
        ratio = torch.where(norm > 0, delta / norm, 0.0)
        return _Queries(q, dout, (wide * ratio.unsqueeze(-1)).to(q.dtype), lse), start

    def pack(self, item: Item) -> tuple[Tensor, ...]:
        if item.kind == "kv":
            return self.pack_kv(item)
        rows, heads = self.rows(item.chunk), self.heads("q", item.heads)
        q, dout, out = (x[:, rows, heads] for x in self.own[:3])
        stats = torch.stack([self.own.lse[:, heads, rows].transpose(1, 2), _delta(dout, out)], dim=2)
        return torch.stack([q, dout], dim=2).transpose(0, 1).contiguous(), stats.transpose(0, 1).contiguous()

    def fold(self, item: Item, arrived: tuple[Tensor, ...]) -> None:
        rows, heads = self.rows(item.chunk), self.heads(item.kind, item.heads)
        if item.kind == "dq":
            self.dq[:, rows, heads] += arrived[0].transpose(0, 1)
        else:
            self.kv.fold(rows, heads, arrived[0])


def _delta(dout: Tensor, out: Tensor) -> Tensor:
    """sum(dout * out) over the head dimension, [B, T, H] in accumulation precision."""
    wide = fused.accumulation_dtype(dout.dtype)
    return (dout.to(wide) * out.to(wide)).sum(dim=-1)


def _unpack(joint: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves, [B, tokens, H, D], of a token-major buffer [tokens, B, 2, H, D], as views."""
    return joint[:, :, 0].transpose(0, 1), joint[:, :, 1].transpose(0, 1)


def _of_rows(part: RowBand, *tensors: Tensor) -> list[Tensor]:
    return [x[part.row0 : part.row1] for x in tensors]
