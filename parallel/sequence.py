"""SequenceMeta: what a mixer is told about the packed sequences whose shard it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from lctrain.parallel.attention import sequence_parallel_attention
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask, Borders
from lctrain.parallel.strategy import Strategy

T = TypeVar("T")


class SequenceMeta:
    """One batch of packed sequences, seen from one rank of a sequence group.

    positions: int64 [B, layout.local_length], restarting in every document.
    documents: per batch row, the global document borders.
    strategy: how attention works over the ranks: the same in all layers, or one for each kind: a window, None for layers
        without, "+" for latent attention.
    side_loss_scale: factor of a layer's own loss, given as this rank's part of a mean over the micro-batch, that makes its
        gradient weigh as much as that of the main loss in the step.
    samples: per batch row, the number of its sample in the run. tasks: per batch row and document, the number of its corpus.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        group: RankGroup,
        positions: Tensor,
        documents: tuple[Borders, ...],
        strategy: str | Strategy | Mapping[int | str | None, Strategy] = "ring",
        side_loss_scale: float = 1.0,
        samples: tuple[int, ...] | None = None,
        tasks: tuple[tuple[int, ...], ...] | None = None,
    ) -> None:
        self.layout, self.group, self.positions, self.documents = layout, group, positions, documents
        self.side_loss_scale, self.samples, self.tasks = side_loss_scale, samples, tasks
        self._strategy = Strategy(strategy) if isinstance(strategy, str) else strategy
        self._made: dict[object, object] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """`make()` the first time `key` is asked for, the same object after that: what all layers share, such as rotations."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[return-value]

    def mask(self, window: int | None = None) -> AttentionMask:
        """Causal attention within documents."""
        return self.once(("mask", window), lambda: AttentionMask(self.documents, causal=True, window=window))

    def strategy(self, kind: int | str | None = None) -> Strategy:
        """How attention of this kind works over the ranks."""
        return self._strategy if isinstance(self._strategy, Strategy) else self._strategy[kind]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, sinks: Tensor | None = None) -> Tensor:
        """Causal attention within documents over the whole sequence: q [B, T, H, D], k, v [B, T, Hkv, D] -> [B, T, H, D].

        sinks: [H], see sequence_parallel_attention.
        """
        mask, strategy = self.mask(window), self.strategy(window)
        out, _ = sequence_parallel_attention(
            q, k, v, layout=self.layout, mask=mask, group=self.group, strategy=strategy, sinks=sinks, need_lse=False
        )
        return out
