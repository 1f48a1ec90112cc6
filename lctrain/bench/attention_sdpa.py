"""The yardstick of `lctrain bench attention`: one process with torch's scaled_dot_product_attention over the whole sequence."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from lctrain.bench.attention_problem import Gradients, Pass, Problem, measure
from lctrain.parallel.mask import AttentionMask


class WholeSequence:
    """SDPA knows neither borders nor windows: documents go one after the other, and windows are masks, made beforehand."""

    def __init__(self, problem: Problem) -> None:
        self.inputs = problem.inputs()
        self.lengths = [end - start for start, end in itertools.pairwise(problem.borders)]
        window = problem.window
        self.masks = {
            length: AttentionMask.dense(length, window=window).live(length)[0]
            for length in self.lengths
            if window is not None and window < length
        }

    def exact(self) -> Gradients | None:
        """Results in fp64."""
        q, k, v, dout = (x.double() for x in self.inputs)
        return measure(self._attend, (q, k, v, dout), want_results=True).results

    def run(self, threads: int, want_results: bool) -> Pass:
        """One pass in the problem's dtype."""
        torch.set_num_threads(threads)
        return measure(self._attend, self.inputs, want_results)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.transpose(1, 2).split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        outs = [self._document(*part) for part in parts]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)).transpose(1, 2)

    def _document(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.masks.get(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
