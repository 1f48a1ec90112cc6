"""TokenCache: what decoding keeps of every token so far."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenCache:
    """A tensor [B, tokens, ...] that grows in place, by doubling."""

    def __init__(self) -> None:
        self.tokens = 0
        self._all = torch.empty(0)

    def append(self, x: Tensor) -> Tensor:
        """Add the newest tokens' entries [B, S, ...]; returns those of all tokens, as a view."""
        end = self.tokens + x.shape[1]
        if self.tokens == 0 or end > self._all.shape[1]:
            grown = x.new_empty(x.shape[0], max(end, 2 * self.tokens), *x.shape[2:])
            if self.tokens:
                grown[:, : self.tokens] = self._all[:, : self.tokens]
            self._all = grown
        self._all[:, self.tokens : end] = x
        self.tokens = end
        return self._all[:, :end]
