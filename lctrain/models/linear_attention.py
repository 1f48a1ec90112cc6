"""Linear attention with constant decay (Lightning Attention-2, Qin et al. 2024, arXiv 2401.04658): the mixer `L`.

    q, k, v = act(projections);  S_t = exp(-s_h) S_{t-1} + v k^T;  y = S q;  output = W_out (sigmoid(W_g input) * RMSNorm(y))
with the slopes s_h = 2^(-8 h / H) of ALiBi for heads h = 1 .. H. This is the state-space scan with step 1, A = -s, B = k, C = q
and as many groups as heads. With norm=whole and slower_with_depth it is MiniMax-01's layer (arXiv 2501.08313) as transformers
computes it. There is no position embedding: the decay tells the order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.model import ModelConfig
from lctrain.kernels.gated_norm.fused import rms_norm_then_gate
from lctrain.kernels.ssd.best import best_ssd
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Family, Place
from lctrain.models.recurrent import RecurrentState, document_starts, scan_flops
from lctrain.models.tensor_parallel import column_linear, gather_tokens, row_linear
from lctrain.parallel.mask import Borders
from lctrain.parallel.scan import sequence_parallel_scan
from lctrain.parallel.sequence import SequenceMeta


class LinearAttention(nn.Module):
    """Linear attention within documents, over a sequence that may be spread over ranks; tensor-parallel ranks divide the heads.

    depth: place among the sublayers that mix tokens, from 0, and their number.
    """

    def __init__(self, config: ModelConfig, parallel: ModelParallel | None = None, depth: tuple[int, int] = (0, 1)) -> None:
        super().__init__()
        self.parallel = parallel = parallel or ModelParallel()
        self.settings = settings = config.linear_attention
        self.head_dim = settings.head_dim or config.d_model // settings.n_heads
        tp, width = parallel.tp.size, settings.n_heads * self.head_dim
        assert settings.n_heads % tp == 0, (settings.n_heads, tp)
        assert tp == 1 or settings.norm == "head", "a norm over all heads needs them all"
        self.heads, self.depth = settings.n_heads // tp, depth
        self.q, self.k, self.v, self.gate = (column_linear(parallel, config.d_model, width) for _ in range(4))
        self.norm = nn.Parameter(torch.empty(width // tp))
        self.out = row_linear(parallel, width, config.d_model)
        self.eps = config.norm_eps

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {"norm": Place(Family.NORM, {"tp": 0} if self.parallel.tp.size > 1 else {})}

    def rates(self, device: torch.device) -> Tensor:
        """-s of this rank's heads: natural logarithm of what remains of a state per token, fp64 [heads]."""
        total = self.settings.n_heads
        first = self.parallel.tp.rank * self.heads
        head = torch.arange(first + 1, first + self.heads + 1, dtype=torch.float64, device=device)
        slopes = torch.exp2(-8.0 / total * head)
        if self.settings.slower_with_depth:
            layer, layers = self.depth
            slopes *= 1 - layer / (layers - 1 + 1e-5) + 1e-5
        return -slopes

    def forward(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, T, d_model] -> same shape."""
        x = gather_tokens(self.parallel, x, seq)
        y = sequence_parallel_scan(
            *self._arguments(x),
            None,
            resets=document_starts(seq),
            layout=seq.layout,
            group=seq.group,
            chunk=self.settings.chunk,
        )
        return self._finish(y, x)

    def new_state(self) -> RecurrentState:
        """State for `decode`."""
        return RecurrentState()

    def decode(self, x: Tensor, state: RecurrentState) -> Tensor:
        """The newest tokens x [B, S, d_model] of one document, given the state after the earlier ones; one process."""
        y, state.scan = best_ssd(*self._arguments(x), None, state.scan, chunk=self.settings.chunk)
        return self._finish(y, x)

    def flops(self, documents: tuple[Borders, ...]) -> int:
        """Multiply-adds x 2 of one forward pass over whole sequences with these documents; see Mamba2.flops."""
        per_token = sum(m.weight.numel() for m in (self.q, self.k, self.v, self.gate, self.out))
        sizes = (self.heads, self.head_dim, self.heads, self.head_dim, self.settings.chunk)
        return sum(2 * row[-1] * per_token + scan_flops(row[-1], *sizes) for row in documents)

    def _arguments(self, x: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
        """Values, steps, rates, keys and queries, as the scan takes them."""
        q, k, v = (project(x).unflatten(-1, (self.heads, self.head_dim)) for project in (self.q, self.k, self.v))
        if self.settings.activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        return v, None, self.rates(x.device), k, q

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        parts = 1 if self.settings.norm == "whole" else self.heads
        weight = self.norm.to(y.dtype).to(torch.promote_types(y.dtype, torch.float32))  # rounded as every norm's weight is
        return self.out(rms_norm_then_gate(y.flatten(2), self.gate(x), weight, self.eps, parts))
