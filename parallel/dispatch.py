"""Expert parallelism: tokens travel to the ranks that hold their experts, and the results travel back.

The ranks of an `ep` group divide the experts among them, in order; those of an `etp` group hold slices of the same experts.
Every exchange is its own reverse, so that gradients travel back along the same way and no rank has to be asked twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lctrain.parallel.group import RankGroup


def exchange_rows(x: Tensor, group: RankGroup, kind: str, send_rows: Sequence[int], receive_rows: Sequence[int]) -> Tensor:
    """RankGroup.all_to_all with a gradient, which travels the other way round."""
    if group.size == 1:
        return x
    return _ExchangeRows.apply(x, group, kind, tuple(send_rows), tuple(receive_rows))


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: RankGroup, kind: str, send_rows: tuple[int, ...], receive_rows: tuple[int, ...]
    ) -> Tensor:
        ctx.settings = group, kind, send_rows, receive_rows
        return group.all_to_all(kind, x, send_rows, receive_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        group, kind, send_rows, receive_rows = ctx.settings
        return group.all_to_all(f"d{kind}", dy, receive_rows, send_rows), None, None, None, None


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """The way of one batch of tokens to the experts' ranks and back.

    ends: int32 [local experts], where each expert's rows end on this rank.
    order: int64 [rows here], the received rows in the order of experts, or None if they arrive so.
    """

    ep: RankGroup
    etp: RankGroup
    ends: Tensor
    order: Tensor | None
    send_rows: tuple[int, ...] = ()
    receive_rows: tuple[int, ...] = ()
    slice_rows: tuple[int, ...] = ()

    @classmethod
    def plan(cls, counts: Tensor, ep: RankGroup, etp: RankGroup) -> Dispatch:
        """Agree on who sends how much. Collective over both groups.

        counts: int64 [all experts], rows that this rank has for each; a multiple of ep.size.
        """
        local = len(counts) // ep.size
        assert local * ep.size == len(counts), (len(counts), ep.size)
        if ep.size == etp.size == 1:
            return cls(ep, etp, counts.cumsum(0).to(torch.int32), None)
        received = ep.all_to_all("expert_counts", counts, [local] * ep.size, [local] * ep.size)
        gathered = etp.all_gather("expert_counts", received).view(-1, local)  # one line for every rank that tokens come from
        send, receive, slices = (
            tuple(rows.sum(1).tolist())
            for rows in (counts.view(ep.size, -1), received.view(ep.size, -1), gathered.view(etp.size, -1))
        )
        experts = torch.arange(local, device=counts.device).repeat(len(gathered)).repeat_interleave(gathered.flatten())
        ends = gathered.sum(0).cumsum(0).to(torch.int32)
        return cls(ep, etp, ends, torch.argsort(experts, stable=True), send, receive, slices)

    def to_experts(self, rows: Tensor) -> Tensor:
        """Rows in the order of all experts -> the rows of this rank's experts, in their order. Collective."""
        if self.order is None:
            return rows
        rows = exchange_rows(rows, self.ep, "tokens", self.send_rows, self.receive_rows)
        if self.etp.size > 1:  # every slice of an expert sees all of its tokens
            mine = [len(rows)] * self.etp.size
            rows = exchange_rows(rows.repeat(self.etp.size, 1), self.etp, "token_slices", mine, self.slice_rows)
        return _Reorder.apply(rows, self.order, _inverse(self.order))

    def from_experts(self, rows: Tensor) -> Tensor:
        """The way back; what the slices of an expert give is added up, in fp32 or wider. Collective."""
        if self.order is None:
            return rows
        rows = _Reorder.apply(rows, _inverse(self.order), self.order)
        if self.etp.size > 1:
            mine = sum(self.receive_rows)
            parts = exchange_rows(rows, self.etp, "token_slices", self.slice_rows, [mine] * self.etp.size)
            wide = torch.promote_types(rows.dtype, torch.float32)
            rows = parts.view(self.etp.size, mine, parts.shape[1]).sum(0, dtype=wide).to(rows.dtype)
        return exchange_rows(rows, self.ep, "tokens", self.receive_rows, self.send_rows)


class _Reorder(torch.autograd.Function):
    """rows[order] for a permutation: its gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return dy.index_select(0, inverse), None, None


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return inverse
