"""What is computed: masks, heads and inputs of one attention problem, a pure function of its settings."""

from __future__ import annotations

import dataclasses
import random
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from lctrain.devices import DTYPES
from lctrain.parallel.mask import AttentionMask, Borders
from lctrain.parallel.payload import AttentionShape

HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1), "uneven": (3, 3)}
HEAD_DIM = 16


class Inputs(NamedTuple):
    """q, dout [B, T, H, D], k, v [B, T, Hkv, D], sinks [H] or None, all in the problem's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    sinks: Tensor | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Settings that one process and many must agree on; names are those of AttentionVerifyConfig."""

    mask: str
    length: int
    batch: int
    heads: str
    dtype: str
    seed: int

    @property
    def shape(self) -> AttentionShape:
        """Sizes of the tensors."""
        return AttentionShape(self.batch, *HEADS[self.heads], HEAD_DIM, DTYPES[self.dtype])

    def attention_mask(self) -> AttentionMask:
        """The mask, with a row of document borders per sequence where these matter."""
        packed = self.mask in ("documents", "documents_window", "sinks")
        rows = tuple(self.borders(row) for row in range(self.batch)) if packed else ((0, self.length),)
        window = max(3, self.length // 5) if self.mask in ("window", "documents_window") else None
        return AttentionMask(rows, causal=self.mask != "full", window=window)

    def borders(self, row: int) -> Borders:
        """Documents of one sequence, among them one of a single token; odd rows end in padding."""
        draw = random.Random(f"{self.seed} {self.length} {row}")
        end = self.length if row % 2 == 0 else max(1, self.length - max(1, self.length // 6))
        cuts = {draw.randint(1, end) for _ in range(3)}
        return (0, *sorted(cuts | {cut + 1 for cut in list(cuts)[:1] if cut < end} | {end}))

    def inputs(self) -> Inputs:
        """Standard normal tensors; the first rows of a larger batch are those of a smaller one."""
        rows = [self._row(row) for row in range(self.batch)]
        sinks = torch.randn(self.shape.n_heads, generator=self._generator("sinks")).to(self.shape.dtype)
        q, k, v, dout = map(torch.stack, zip(*rows, strict=True))
        return Inputs(q, k, v, dout, sinks if self.mask == "sinks" else None)

    def _row(self, row: int) -> tuple[Tensor, ...]:
        generator, shape = self._generator(row), self.shape
        heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads, shape.n_heads)
        return tuple(torch.randn(self.length, n, HEAD_DIM, generator=generator).to(shape.dtype) for n in heads)

    def _generator(self, what: int | str) -> torch.Generator:
        name = repr((self.seed, what, self.heads, self.length))
        return torch.Generator().manual_seed(zlib.crc32(name.encode()))
