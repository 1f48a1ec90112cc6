"""Grouped-query attention: the mixers `*` (all of the document) and `W` (a sliding window)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lctrain.config.model import ModelConfig
from lctrain.kernels.attention import fused
from lctrain.kernels.attention.band import Band
from lctrain.kernels.attention.merge import add_sinks
from lctrain.kernels.rotary.fused import rotate
from lctrain.models.head_routing import HeadRouter
from lctrain.models.layers import RMSNorm
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Place
from lctrain.models.rope import rotation
from lctrain.models.tensor_parallel import column_linear, gather_tokens, heads_linear, row_linear
from lctrain.models.token_cache import TokenCache
from lctrain.parallel.mask import AttentionMask, Borders
from lctrain.parallel.sequence import SequenceMeta


class KeyValueCache:
    """Keys and values of the tokens so far, [B, tokens, Hkv, D]."""

    def __init__(self) -> None:
        self._keys, self._values = TokenCache(), TokenCache()

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._keys.tokens

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest tokens' k and v; returns all of them."""
        return self._keys.append(k), self._values.append(v)


class Attention(nn.Module):
    """Causal self-attention within documents, over a sequence that may be spread over ranks.

    Tensor-parallel ranks divide the query heads; each has the key/value heads that those need. With routed heads, what every
    head gives is weighted for each token by itself (see HeadRouter).
    """

    def __init__(self, config: ModelConfig, windowed: bool, parallel: ModelParallel | None = None) -> None:
        super().__init__()
        self.parallel = parallel = parallel or ModelParallel()
        settings = config.attention
        self.rope, self.rotary = settings.rope, settings.rotary
        self.window = settings.window if windowed else None
        self.head_dim = settings.head_dim or config.d_model // settings.n_heads
        d_model, heads, kv_heads, bias = config.d_model, settings.n_heads, settings.n_kv_heads, settings.bias
        assert heads % parallel.tp.size == 0, (heads, parallel.tp.size)
        self.q = column_linear(parallel, d_model, heads * self.head_dim, bias)
        self.k = heads_linear(parallel, d_model, kv_heads, self.head_dim, bias)
        self.v = heads_linear(parallel, d_model, kv_heads, self.head_dim, bias)
        self.out = row_linear(parallel, heads * self.head_dim, d_model, settings.out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps, parallel) if settings.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps, parallel) if settings.qk_norm else None
        self.sinks = nn.Parameter(torch.empty(heads // parallel.tp.size)) if settings.sinks else None
        routed = settings.routed_heads
        self.head_router = HeadRouter(d_model, heads, routed, parallel) if routed is not None else None

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {"sinks": Place(cuts={"tp": 0})} if self.parallel.tp.size > 1 else {}

    def forward(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, T, d_model] -> same shape."""
        weights = None
        if self.head_router is not None:
            own = gather_tokens(self.parallel, self.head_router(x, seq), seq).chunk(self.parallel.tp.size, dim=-1)
            weights = own[self.parallel.tp.rank]
        x = gather_tokens(self.parallel, x, seq)
        turn = seq.once(("rotation", self.rope, self.head_dim), lambda: rotation(self.rope, self.head_dim, seq.positions))
        q, k, v = self._project(x, *turn)
        return self.out(_weighted(seq.attend(q, k, v, self.window, self.sinks), weights).flatten(2))

    def new_state(self) -> KeyValueCache:
        """State for `decode`."""
        return KeyValueCache()

    def decode(self, x: Tensor, state: KeyValueCache) -> Tensor:
        """The newest tokens x [B, S, d_model] of one document, given the state after the earlier ones; one process."""
        start = state.tokens
        positions = torch.arange(start, start + x.shape[1], device=x.device).expand(x.shape[0], -1)
        q, k, v = self._project(x, *rotation(self.rope, self.head_dim, positions))
        k, v = state.append(k, v)
        oldest = None if self.window is None else start - self.window + 1
        band = Band(0, q.shape[1], 0, k.shape[1], oldest, start).trim()
        assert band is not None, "a token sees itself"
        mixed, lse, _ = fused.forward(q, k, v, band, self.head_dim**-0.5)
        if self.sinks is not None:
            mixed, _ = add_sinks(mixed, lse, self.sinks)
        weights = None if self.head_router is None else self.head_router.decode(x)
        return self.out(_weighted(mixed.to(x.dtype), weights).flatten(2))

    def flops(self, documents: tuple[Borders, ...]) -> int:
        """Multiply-adds x 2 of one forward pass over whole sequences with these documents, live score entries only."""
        length = max(borders[-1] for borders in documents)
        tokens = sum(borders[-1] for borders in documents)
        mask = AttentionMask(documents, causal=True, window=self.window)
        products = sum(p.numel() for p in (self.q.weight, self.k.weight, self.v.weight, self.out.weight))
        products += 0 if self.head_router is None else sum(p.numel() for p in self.head_router.parameters())
        return 2 * tokens * products + 4 * self.q.weight.shape[0] * mask.total_entries(length)

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if not self.rotary:
            return q, k, v
        return rotate(q, cos, sin), rotate(k, cos, sin), v


def _weighted(mixed: Tensor, weights: Tensor | None) -> Tensor:
    """Heads' outputs [B, T, H, D] times their weights [B, T, H]."""
    return mixed if weights is None else mixed * weights.unsqueeze(-1).to(mixed.dtype)
