"""Multi-head latent attention: the mixer `+` (DeepSeek-V2, arXiv 2405.04434, and DeepSeek-V3).

Queries and keys are [entries without position | rotated entries]. A token's latent is [normed compressed latent | rotated key
entries that all heads share]: all that other tokens need of it. Training expands it into keys and values of every head;
decoding never does (the expansion is absorbed into query and output, section 2.1 of the paper).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.model import ModelConfig
from lctrain.kernels.attention import fused
from lctrain.kernels.attention.band import Band
from lctrain.kernels.rotary.fused import rotate
from lctrain.models.layers import Linear, RMSNorm
from lctrain.models.parallel import ModelParallel
from lctrain.models.rope import rotation, yarn_temperature
from lctrain.models.tensor_parallel import column_linear, gather_tokens, row_linear, shared
from lctrain.models.token_cache import TokenCache
from lctrain.parallel.attention import sequence_parallel_attention, sequence_parallel_latent_attention
from lctrain.parallel.cost import traffic
from lctrain.parallel.layout import SequenceLayout
from lctrain.parallel.mask import AttentionMask, Borders
from lctrain.parallel.payload import AttentionShape
from lctrain.parallel.sequence import SequenceMeta
from lctrain.parallel.strategy import Strategy


class TravelBytes(NamedTuple):
    """Bytes that all ranks together send for one layer, forward and backward, on one document of the whole length."""

    latent: int
    heads: int


def head_size(settings: LatentAttentionConfig) -> int:
    """Size of a head in the kernel, which wants that of values equal to that of keys: the smaller is padded with zeros."""
    return max(settings.qk_nope_head_dim + settings.qk_rope_head_dim, settings.v_head_dim)


@lru_cache(maxsize=64)
def travel_bytes(
    settings: LatentAttentionConfig, n_heads: int, strategy: Strategy, world_size: int, length: int, dtype: torch.dtype
) -> TravelBytes:
    """What `settings.travel=auto` compares; a pure function, so that all ranks choose alike.

    Per token and hop, with H heads of D entries, a latent of C and b bytes per entry: heads 2 H D b forward and
    2 H D (b + 4) backward, latent C b and C (b + 4). Strategies that exchange heads for sequence over U ranks send heads
    once, 2 H D b (U - 1) / U each way, and the latent to each of the others, C b (U - 1).
    """
    layout, mask = SequenceLayout("zigzag", world_size, length), AttentionMask.dense(length)
    size = head_size(settings)
    latent = settings.kv_lora_rank + settings.qk_rope_head_dim
    totals = []
    for width in (latent, None):
        shape = AttentionShape(1, n_heads, n_heads, size, dtype, width)
        forward, backward = (
            sum(traffic(strategy, layout, mask, shape, way, rank).total() for rank in range(world_size))
            for way in ("forward", "backward")
        )
        totals.append(forward + backward)
    return TravelBytes(*totals)


def latent_travels(
    settings: LatentAttentionConfig, n_heads: int, strategy: Strategy, world_size: int, length: int, dtype: torch.dtype
) -> bool:
    """Whether latents travel between context-parallel ranks, and not keys and values of `n_heads` heads."""
    if settings.travel != "auto" or world_size == 1:  # alone, keys and values need not be computed twice
        return settings.travel == "latent"
    sent = travel_bytes(settings, n_heads, strategy, world_size, length, dtype)
    return sent.latent < sent.heads


class LatentAttention(nn.Module):
    """Causal self-attention within documents, over a sequence that may be spread over ranks.

    Tensor-parallel ranks divide the heads; latents are formed whole on each.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallel) -> None:
        super().__init__()
        self.parallel = parallel
        settings = self.settings = config.latent_attention
        assert settings.n_heads % parallel.tp.size == 0, (settings.n_heads, parallel.tp.size)
        self.n_heads = settings.n_heads // parallel.tp.size
        self.nope, self.rope_dim, self.rank = settings.qk_nope_head_dim, settings.qk_rope_head_dim, settings.kv_lora_rank
        self.qk_dim, self.v_dim, self.size = self.nope + self.rope_dim, settings.v_head_dim, head_size(settings)
        self.scale = self.qk_dim**-0.5 * yarn_temperature(settings.rope, settings.rope.mscale_all_dim) ** 2
        d_model, heads = config.d_model, settings.n_heads
        if settings.q_lora_rank is None:
            self.q_down = self.q_norm = None
        else:
            self.q_down = Linear(d_model, settings.q_lora_rank)
            self.q_norm = RMSNorm(settings.q_lora_rank, config.norm_eps, parallel)
        self.q_up = column_linear(parallel, settings.q_lora_rank or d_model, heads * self.qk_dim)
        self.kv_down = Linear(d_model, self.rank + self.rope_dim)
        self.kv_norm = RMSNorm(self.rank, config.norm_eps, parallel)
        self.kv_up = column_linear(parallel, self.rank, heads * (self.nope + self.v_dim))
        self.out = row_linear(parallel, heads * self.v_dim, d_model)

    def forward(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, T, d_model] -> same shape."""
        rope = self.settings.rope
        turn = seq.once(("rotation", rope, self.rope_dim), lambda: rotation(rope, self.rope_dim, seq.positions))
        x = gather_tokens(self.parallel, x, seq)
        q, latent = self._queries(x, *turn), self._latent(x, *turn)
        weight = self.kv_up.weight.to(x.dtype)
        q, strategy = F.pad(q, (0, self.size - self.qk_dim)), seq.strategy("+")
        over = {"layout": seq.layout, "mask": seq.mask(), "group": seq.group, "strategy": strategy, "scale": self.scale}
        if latent_travels(self.settings, self.n_heads, strategy, seq.group.size, seq.layout.length, x.dtype):
            mixed = sequence_parallel_latent_attention(q, latent, weight, self.expand, **over)
        else:
            mixed, _ = sequence_parallel_attention(q, *self.expand(latent, weight), need_lse=False, **over)
        return self.out(mixed[..., : self.v_dim].flatten(2))

    def new_state(self) -> TokenCache:
        """State for `decode`: the latents of the tokens so far."""
        return TokenCache()

    def decode(self, x: Tensor, state: TokenCache) -> Tensor:
        """The newest tokens x [B, S, d_model] of one document, given the state after the earlier ones; one process."""
        start = state.tokens
        positions = torch.arange(start, start + x.shape[1], device=x.device).expand(x.shape[0], -1)
        turn = rotation(self.settings.rope, self.rope_dim, positions)
        q, latents = self._queries(x, *turn), state.append(self._latent(x, *turn)).unsqueeze(2)
        up = self.kv_up.weight.to(x.dtype).unflatten(0, (self.n_heads, -1))
        absorbed = torch.einsum("bshn,hnl->bshl", q[..., : self.nope], up[:, : self.nope])
        band = Band(0, q.shape[1], 0, latents.shape[1], None, start).trim()
        assert band is not None, "a token sees itself"
        q = torch.cat([absorbed, q[..., self.nope :]], dim=-1)
        mixed, _, _ = fused.forward(q, latents, latents, band, self.scale)
        values = torch.einsum("bshl,hvl->bshv", mixed[..., : self.rank].to(x.dtype), up[:, self.nope :])
        return self.out(values.flatten(2))

    def flops(self, documents: tuple[Borders, ...]) -> int:
        """Multiply-adds x 2 of one forward pass over whole sequences with these documents, live score entries only."""
        length = max(borders[-1] for borders in documents)
        tokens = sum(borders[-1] for borders in documents)
        whole = sum(linear.weight.numel() for linear in (self.q_down, self.kv_down) if linear is not None)
        cut = self.parallel.tp.size * sum(linear.weight.numel() for linear in (self.q_up, self.kv_up, self.out))
        per_entry = self.settings.n_heads * (self.qk_dim + self.v_dim)
        return 2 * tokens * (whole + cut) + 2 * per_entry * AttentionMask(documents).total_entries(length)

    def expand(self, latent: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, T, H, size] of those heads whose rows of kv_up are in `weight`, from latents [B, T, rank + rope_dim]."""
        up = F.linear(latent[..., : self.rank], weight).unflatten(-1, (-1, self.nope + self.v_dim))
        common = latent[..., None, self.rank :].expand(*up.shape[:3], -1)
        k = torch.cat([up[..., : self.nope], common], dim=-1)
        return F.pad(k, (0, self.size - self.qk_dim)), F.pad(up[..., self.nope :], (0, self.size - self.v_dim))

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, H, qk_dim]."""
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self._shared_linear(self.q_down, x))
        q = self.q_up(x).unflatten(-1, (self.n_heads, self.qk_dim))
        return torch.cat([q[..., : self.nope], rotate(q[..., self.nope :], cos, sin)], dim=-1)

    def _latent(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, rank + rope_dim]."""
        down = self._shared_linear(self.kv_down, x)
        turned = rotate(down[..., None, self.rank :], cos, sin).squeeze(2)
        return torch.cat([self.kv_norm(down[..., : self.rank]), turned], dim=-1)

    def _shared_linear(self, linear: Linear, x: Tensor) -> Tensor:
        """Every tensor-parallel rank forms all of a latent, but only its own heads' part of the gradient."""
        return F.linear(x, shared(self.parallel, linear.weight).to(x.dtype))
