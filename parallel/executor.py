"""The executor: runs any checked schedule over a process group as one differentiable operation.

Transfers of a step are started before its tiles are computed and waited for after. Partial results are kept in fp32 (fp64
for fp64 inputs) in buffers of their own, never in a buffer that is received into again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lctrain.kernels.attention import fused
from lctrain.kernels.attention.band import Band
from lctrain.kernels.attention.merge import merge_
from lctrain.parallel.group import SequenceGroup
from lctrain.parallel.mask import RowBand
from lctrain.parallel.plan import AttentionPlan, PlannedStep, Work
from lctrain.parallel.schedule import Chunk, Transfer


class ScheduledAttention(torch.autograd.Function):
    """(q, k, v) of one rank -> (out, lse); lse carries no gradient."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, forward_plan: AttentionPlan, backward_plan, group, scale: float):
        """q: [B, T, H, D]; k, v: [B, T, Hkv, D], T = layout.local_length. Returns out like q, lse [B, H, T]."""
        if forward_plan.whole is not None:
            out, lse, _ = fused.forward(q, k, v, forward_plan.whole.band, scale)
            out = out.to(q.dtype)
        else:
            out, lse = _forward(q, k, v, forward_plan, group, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.group, ctx.scale = backward_plan, group, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout: Tensor, _dlse: Tensor):
        """Gradients of q, k, v; every other argument has none."""
        q, k, v, out, lse = ctx.saved_tensors
        dout = dout.to(q.dtype)
        grads = _backward(dout, q, k, v, out, lse, ctx.plan, ctx.group, ctx.scale)
        return (*(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None, None, None)


class _Keys(NamedTuple):
    """k, v [B, tokens, Hkv, D] of some chunks of one owner; token 0 is the owner's local index `start`."""

    k: Tensor
    v: Tensor
    start: int

    def part(self, start: int, end: int) -> _Keys:
        """The tokens with local indices [start, end)."""
        at = slice(start - self.start, end - self.start)
        return _Keys(self.k[:, at], self.v[:, at], start)

    def band(self, band: Band) -> Band:
        """The band with its columns counted from this buffer's start."""
        if not self.start:
            return band
        lo, hi = (None if bound is None else bound - self.start for bound in (band.lo, band.hi))
        return Band(band.q0, band.q1, band.k0 - self.start, band.k1 - self.start, lo, hi)


class _Courier:
    """Starts a step's transfers and keeps what has arrived, by owner."""

    def __init__(self, plan: AttentionPlan, group: SequenceGroup, k: Tensor, v: Tensor) -> None:
        self.layout, self.group, self.rank = plan.layout, group, plan.rank
        self.keys = {plan.rank: _Keys(k, v, 0)}
        self.packed: dict[Chunk, Tensor] = {}
        self.sums: dict[Chunk, Tensor] = {}
        if plan.layout.world_size > 1:  # token-major, so that any chunk of it is contiguous
            self._register(plan.rank, 0, torch.stack([k, v], dim=2).transpose(0, 1).contiguous())

    def start(self, step: PlannedStep) -> _Flight:
        """Post all sends and receives of a step."""
        sends = [(t.item.kind, self._outgoing(t), t.peer) for t in step.step.sends]
        arriving_keys = [t for t in step.step.receives if t.item.kind == "kv"]
        buffers = self._key_buffers(arriving_keys)
        arriving_sums: list[tuple[Chunk, Tensor]] = []
        receives = []
        for transfer in step.step.receives:
            if transfer.item.kind == "kv":
                receives.append((buffers[transfer.item.chunk], transfer.peer))
            else:
                like = self.packed[Chunk(self.rank, 0)]
                buffer = torch.empty_like(like, dtype=fused.accumulation_dtype(like.dtype))
                arriving_sums.append((transfer.item.chunk, buffer))
                receives.append((buffer, transfer.peer))
        return _Flight(self.group.exchange(sends, receives), [tensor for _, tensor, _ in sends], arriving_sums)

    def finish(self, step: PlannedStep, flight: _Flight) -> None:
        """Wait for a step's transfers, add the sums that came, forget the keys that nobody needs any more."""
        for work in flight.handles:
            work.wait()
        for chunk, buffer in flight.sums:
            if chunk in self.sums:
                self.sums[chunk] += buffer
            else:
                self.sums[chunk] = buffer
        for owner in step.drops:
            del self.keys[owner]
            for index in range(self.layout.chunks):
                self.packed.pop(Chunk(owner, index), None)

    def keys_of(self, work: Work) -> _Keys:
        """The keys that some work needs."""
        size = self.layout.chunk_length
        return self.keys[work.owner].part(work.first * size, (work.last + 1) * size)

    def gradients_of(self, work: Work) -> tuple[Tensor, Tensor]:
        """Zeroed dk, dv for `keys_of(work)`; chunk by chunk they are then the owner's entries in `sums`."""
        like, chunks = self.packed[Chunk(self.rank, 0)], range(work.first, work.last + 1)
        joint = like.new_zeros(len(chunks) * like.shape[0], *like.shape[1:], dtype=fused.accumulation_dtype(like.dtype))
        for index, part in zip(chunks, joint.split(like.shape[0]), strict=True):
            assert Chunk(work.owner, index) not in self.sums, "all gradients for an owner are made in one step"
            self.sums[Chunk(work.owner, index)] = part
        return _unpack(joint)

    def _outgoing(self, transfer: Transfer) -> Tensor:
        return self.packed[transfer.item.chunk] if transfer.item.kind == "kv" else self.sums.pop(transfer.item.chunk)

    def _key_buffers(self, transfers: list[Transfer]) -> dict[Chunk, Tensor]:
        """One buffer per owner, so that neighbouring chunks can go through one kernel call."""
        before = dict(self.packed)
        for owner in dict.fromkeys(t.item.chunk.owner for t in transfers):
            indices = [t.item.chunk.index for t in transfers if t.item.chunk.owner == owner]
            assert owner not in self.keys
            assert indices == list(range(indices[0], indices[-1] + 1))
            like = self.packed[Chunk(self.rank, 0)]
            self._register(owner, indices[0], like.new_empty(len(indices) * like.shape[0], *like.shape[1:]))
        return {chunk: buffer for chunk, buffer in self.packed.items() if chunk not in before}

    def _register(self, owner: int, first: int, joint: Tensor) -> None:
        k, v = _unpack(joint)
        self.keys.setdefault(owner, _Keys(k, v, first * self.layout.chunk_length))
        for index, part in enumerate(joint.split(self.layout.chunk_length)):
            self.packed[Chunk(owner, first + index)] = part


class _Flight(NamedTuple):
    """Transfers under way: handles, tensors that must stay alive, and sums to add on arrival."""

    handles: list[dist.Work]
    alive: list[Tensor]
    sums: list[tuple[Chunk, Tensor]]


def _unpack(joint: Tensor) -> tuple[Tensor, Tensor]:
    """k and v, [B, tokens, Hkv, D], as views of a token-major buffer [tokens, B, 2, Hkv, D]."""
    return joint[:, :, 0].transpose(0, 1), joint[:, :, 1].transpose(0, 1)


def _rows(part: RowBand, *tensors: Tensor) -> list[Tensor]:
    return [x[part.row0 : part.row1] for x in tensors]


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, group: SequenceGroup, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    out = torch.zeros_like(q, dtype=fused.accumulation_dtype(q.dtype))
    lse = out.new_full((batch, heads, tokens), float("-inf"))
    courier = _Courier(plan, group, k, v)
    for step in plan.steps:
        flight = courier.start(step)
        for work in step.work:
            keys = courier.keys_of(work)
            for part in work.bands:
                q_rows, k_rows, v_rows, out_rows, lse_rows = _rows(part, q, keys.k, keys.v, out, lse)
                partial, partial_lse, at = fused.forward(q_rows, k_rows, v_rows, keys.band(part.band), scale)
                merge_(out_rows[:, at], lse_rows[:, :, at], partial, partial_lse)
        courier.finish(step, flight)
    return out.to(q.dtype), lse


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    group: SequenceGroup,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if plan.whole is not None:
        whole = fused.backward_whole(dout, q, k, v, out, lse, plan.whole.band, scale)
        if whole is not None:
            return whole
    dtype = fused.accumulation_dtype(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    courier = _Courier(plan, group, k, v)
    for step in plan.steps:
        flight = courier.start(step)
        for work in step.work:
            keys = courier.keys_of(work)
            own = _Keys(dk, dv, 0).part(keys.start, keys.start + keys.k.shape[1])
            into = own[:2] if work.owner == plan.rank else courier.gradients_of(work)
            for part in work.bands:
                rows = _rows(part, dout, q, keys.k, keys.v, out, lse)
                fused.backward_(*rows, keys.band(part.band), scale, _rows(part, dq, *into))
        courier.finish(step, flight)
    for index in range(plan.layout.chunks):
        home = courier.sums.pop(Chunk(plan.rank, index), None)
        if home is not None:
            at = slice(index * plan.layout.chunk_length, (index + 1) * plan.layout.chunk_length)
            from_k, from_v = _unpack(home)
            dk[:, at] += from_k
            dv[:, at] += from_v
    assert not courier.sums, "the checker proved that every gradient goes home"
    return dq, dk, dv
