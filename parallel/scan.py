"""Linear recurrences over a sequence that is spread over ranks: every run of consecutive tokens is a virtual segment.

A run by itself leaves (decay, added) to the state (lctrain.kernels.ssd.merge). Ranks gather these summaries, merge those of the
earlier runs in order of position, and go on from the state that reaches each of theirs. Backward is the same in reverse order:
what travels are gradients of states. A summary has the size of a state, however long the run. Only the order of runs in the
sequence matters, so every layout of runs is exact, and a model that mixes attention and recurrences keeps one layout.

The alternative, to scan from zero states and add C . decay . state afterwards, would cost one more product of that size per
token forward and three backward. Here the states that chunks leave behind are formed before the exchange and used after it:
no product is formed twice, and the wait for the summaries is the only price.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lctrain.kernels.causal_conv.fused import causal_conv
from lctrain.kernels.ssd.best import best_ssd
from lctrain.kernels.ssd.chunked import CHUNK
from lctrain.kernels.ssd.merge import Summary, exclusive
from lctrain.parallel.group import RankGroup
from lctrain.parallel.halo import fetch_halos, transfers
from lctrain.parallel.layout import SequenceLayout


def sequence_parallel_scan(
    x: Tensor,
    dt: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    resets: Tensor,
    layout: SequenceLayout,
    group: RankGroup,
    chunk: int = CHUNK,
) -> Tensor:
    """This rank's outputs of `lctrain.kernels.ssd.chunked.ssd` over the whole sequence, [B, local_length, H, P].

    Collective over the group. Bytes are counted as "state" and, in backward, "state gradient"; see `state_bytes`.

    Args:
        x, dt, B, C: this rank's tokens, [B, local_length, ...] as in `ssd`; A, D: the same on all ranks.
        resets: bool [B, local_length], True at the first token of every document.

    Raises:
        ValueError: the layout has no runs of consecutive tokens.
    """
    check_layout(layout)
    if layout.world_size == layout.chunks == 1:
        return best_ssd(x, dt, A, B, C, D, resets=resets, chunk=chunk)[0]
    folded = (None if t is None else _runs(t, layout) for t in (x, dt, B, C, resets))
    x, dt, B, C, resets = folded  # type: ignore[assignment]
    y, _ = best_ssd(x, dt, A, B, C, D, resets=resets, chunk=chunk, relay=RankRelay(layout, group))
    return _tokens(y, layout)


def sequence_parallel_convs(
    inputs: Sequence[tuple[Tensor, Tensor, Tensor | None]], *, positions: Tensor, layout: SequenceLayout, group: RankGroup
) -> list[Tensor]:
    """`lctrain.kernels.causal_conv.fused.causal_conv` of each (x, weight, bias) over the whole sequence; halos travel together.

    Args:
        inputs: x [B, local_length, C], weight [C, K], bias [C] or None, with one K for all.
        positions: int [B, local_length], restarting in every document.

    Returns:
        This rank's outputs, each like its x. Collective over the group; see fetch_halos.
    """
    check_layout(layout)
    if layout.world_size == layout.chunks == 1:
        return [causal_conv(x, weight, bias, positions) for x, weight, bias in inputs]
    halos = fetch_halos([x for x, _, _ in inputs], layout, group, inputs[0][1].shape[1] - 1)
    runs = _runs(positions, layout)
    return [
        _tokens(causal_conv(_runs(x, layout), weight, bias, runs, halo.flatten(0, 1)), layout)
        for (x, weight, bias), halo in zip(inputs, halos, strict=True)
    ]


def check_layout(layout: SequenceLayout) -> None:
    """ValueError for a layout without runs of consecutive tokens, where every token would need a summary of its own."""
    if layout.kind == "striped" and layout.world_size > 1:
        raise ValueError(
            "layout striped has no consecutive tokens on a rank, which recurrent layers (M, L) need:"
            " choose zigzag, contiguous or balanced"
        )


def state_bytes(layout: SequenceLayout, rows: int, heads: int, size: int, state: int, itemsize: int = 4) -> int:
    """Bytes that each rank sends per scan and direction: its runs' summaries, to every other rank; `rows` is the batch."""
    return (layout.world_size - 1) * rows * layout.chunks * heads * (1 + size * state) * itemsize


def halo_bytes(layout: SequenceLayout, rank: int, rows: int, channels: int, width: int, itemsize: int) -> int:
    """Bytes that `rank` sends forward for the halo of a convolution over width + 1 tokens; backward it receives as many."""
    plan = transfers(layout, width)
    tokens = sum(len(at) for (owner, receiver), (at, _) in plan.items() if owner == rank != receiver)
    return tokens * rows * channels * itemsize


class RankRelay:
    """States between the runs of all ranks; rows are batch x runs, runs fastest. For one forward and one backward pass."""

    def __init__(self, layout: SequenceLayout, group: RankGroup) -> None:
        self.layout, self.group = layout, group
        starts = [run.start for rank in range(layout.world_size) for run in layout.segments(rank)]
        self._order = sorted(range(len(starts)), key=starts.__getitem__)
        self._mine = range(group.rank * layout.chunks, (group.rank + 1) * layout.chunks)

    def forward(self, rows: Summary) -> Tensor:
        """See lctrain.kernels.ssd.chunked.Relay."""
        return self._reach(rows, self._order, "state")

    def backward(self, rows: Summary) -> Tensor:
        """See lctrain.kernels.ssd.chunked.Relay."""
        return self._reach(rows, self._order[::-1], "state gradient")

    def _reach(self, rows: Summary, order: list[int], kind: str) -> Tensor:
        """What the runs that come before each of mine in `order` leave to it, [R, H, P, N]."""
        chunks, shape = self.layout.chunks, rows.added.shape
        packed = torch.cat([rows.decay, rows.added.flatten(1)], dim=1).unflatten(0, (-1, chunks))
        everyone = self.group.all_gather(kind, packed).transpose(1, 2).flatten(0, 1)  # W runs, B, H (1 + P N)
        summaries = [Summary(run[:, : shape[1]], run[:, shape[1] :].unflatten(1, shape[1:])) for run in everyone]
        reached = dict(zip(order, exclusive(summaries[run] for run in order), strict=True))
        return torch.stack([reached[run] for run in self._mine], dim=1).flatten(0, 1)


def _runs(t: Tensor, layout: SequenceLayout) -> Tensor:
    """[B, local_length, ...] -> [B runs, chunk_length, ...]: all runs have the same length and lie one after the other."""
    return t.unflatten(1, (layout.chunks, layout.chunk_length)).flatten(0, 1)


def _tokens(t: Tensor, layout: SequenceLayout) -> Tensor:
    """Inverse of _runs."""
    return t.unflatten(0, (-1, layout.chunks)).flatten(1, 2)
