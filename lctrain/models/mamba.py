"""Mamba-2 (Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060): the mixer `M`.

    z, x, B, C, dt = projections of the input;  x, B, C = silu(causal depthwise convolution of each)
    dt = clamp(softplus(dt + dt_bias));  h_t = exp(-dt exp(A_log)) h_{t-1} + dt x B^T;  y = h C + D x
    output = W_out (RMSNorm over each group of (y * silu(z)))
Projections and convolutions are separate parameters, so that tensor-parallel ranks can cut z, x and dt by heads, B and C by
groups. A norm over groups needs no sum over ranks: each rank has whole groups.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.model import ModelConfig
from lctrain.kernels.causal_conv.fused import causal_conv
from lctrain.kernels.gated_norm.fused import gated_rms_norm
from lctrain.kernels.ssd.best import best_ssd
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import Family, Place
from lctrain.models.recurrent import RecurrentState, document_starts, scan_flops
from lctrain.models.tensor_parallel import column_linear, gather_tokens, row_linear
from lctrain.parallel.mask import Borders
from lctrain.parallel.scan import sequence_parallel_convs, sequence_parallel_scan
from lctrain.parallel.sequence import SequenceMeta

ScanArguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class CausalConv(nn.Module):
    """The weights of a depthwise convolution: weight [channels, K], the last tap for the token itself, and bias [channels].

    cut: whether tensor-parallel ranks each hold some of the channels.
    """

    def __init__(self, channels: int, kernel: int, bias: bool, cut: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self._cuts = {"tp": 0} if cut else {}

    def places(self) -> dict[str, Place]:
        """See Place."""
        return {"weight": Place(cuts=self._cuts), "bias": Place(cuts=self._cuts)}

    def initial(self, name: str, shape: list[int], std: float, generator: torch.Generator) -> Tensor | None:
        """Uniform within 1 / sqrt(K), as torch's conv1d and with it mamba_ssm; the bias starts at 0."""
        if name != "weight":
            return None
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])


class Mamba2(nn.Module):
    """Mamba-2 within documents, over a sequence that may be spread over ranks; tensor-parallel ranks divide the groups."""

    def __init__(self, config: ModelConfig, parallel: ModelParallel | None = None) -> None:
        super().__init__()
        self.parallel = parallel = parallel or ModelParallel()
        self.settings, self.eps = config.mamba, config.norm_eps
        settings, tp, width = self.settings, parallel.tp.size, config.mamba.width(config.d_model)
        assert settings.n_groups % tp == 0, (settings.n_groups, tp)
        self.groups, self.heads = settings.n_groups // tp, width // settings.head_dim // tp
        states, kernel = settings.n_groups * settings.d_state, settings.conv_kernel
        self.z = column_linear(parallel, config.d_model, width, settings.bias)
        self.x = column_linear(parallel, config.d_model, width, settings.bias)
        self.B = column_linear(parallel, config.d_model, states, settings.bias)
        self.C = column_linear(parallel, config.d_model, states, settings.bias)
        self.dt = column_linear(parallel, config.d_model, width // settings.head_dim, settings.bias)
        self.conv_x = CausalConv(width // tp, kernel, settings.conv_bias, tp > 1)
        self.conv_B = CausalConv(states // tp, kernel, settings.conv_bias, tp > 1)
        self.conv_C = CausalConv(states // tp, kernel, settings.conv_bias, tp > 1)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.empty(self.heads)) for _ in range(3))
        self.norm = nn.Parameter(torch.empty(width // tp))
        self.out = row_linear(parallel, width, config.d_model, settings.bias)

    def places(self) -> dict[str, Place]:
        """See Place."""
        cuts = {"tp": 0} if self.parallel.tp.size > 1 else {}
        return {name: Place(Family.STATE, cuts) for name in ("A_log", "D", "dt_bias")} | {"norm": Place(Family.NORM, cuts)}

    def initial(self, name: str, shape: list[int], std: float, generator: torch.Generator) -> Tensor | None:
        """-A uniform in [a_min, a_max]; steps log-uniform in [dt_min, dt_max], through softplus's inverse; D 1."""
        settings = self.settings
        if name == "A_log":
            return torch.rand(shape, generator=generator).mul_(settings.a_max - settings.a_min).add_(settings.a_min).log_()
        if name == "dt_bias":
            low, high = math.log(settings.dt_min), math.log(settings.dt_max)
            dt = (low + (high - low) * torch.rand(shape, generator=generator)).exp().clamp(min=1e-4)
            return dt + torch.log(-torch.expm1(-dt))
        return torch.ones(shape) if name == "D" else None

    def forward(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, T, d_model] -> same shape."""
        x = gather_tokens(self.parallel, x, seq)
        convs = [(each, conv.weight, conv.bias) for each, conv in zip(self._inputs(x), self._convs, strict=True)]
        values, b, c = sequence_parallel_convs(convs, positions=seq.positions, layout=seq.layout, group=seq.group)
        y = sequence_parallel_scan(
            *self._arguments(x, values, b, c),
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
        inputs = self._inputs(x)
        tails = state.extend(inputs, self.settings.conv_kernel - 1)
        values, b, c = (
            causal_conv(each, conv.weight, conv.bias, halo=tail)
            for each, conv, tail in zip(inputs, self._convs, tails, strict=True)
        )
        y, state.scan = best_ssd(*self._arguments(x, values, b, c), state.scan, chunk=self.settings.chunk)
        return self._finish(y, x)

    def flops(self, documents: tuple[Borders, ...]) -> int:
        """Multiply-adds x 2 of one forward pass over whole sequences with these documents, of which only their sum counts.

        Matrix products only, those of the scan as it computes them, chunk by chunk, masked entries included.
        """
        per_token = sum(m.weight.numel() for m in (self.z, self.x, self.B, self.C, self.dt, self.out))
        sizes = (self.heads, self.settings.head_dim, self.groups, self.settings.d_state, self.settings.chunk)
        return sum(2 * row[-1] * per_token + scan_flops(row[-1], *sizes) for row in documents)

    @property
    def _convs(self) -> tuple[CausalConv, CausalConv, CausalConv]:
        return self.conv_x, self.conv_B, self.conv_C

    def _inputs(self, x: Tensor) -> list[Tensor]:
        return [self.x(x), self.B(x), self.C(x)]

    def _arguments(self, x: Tensor, values: Tensor, b: Tensor, c: Tensor) -> ScanArguments:
        """What the scan takes, in its order."""
        settings = self.settings
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(self.dt(x).to(wide) + self.dt_bias)
        if settings.dt_limit_min > 0 or settings.dt_limit_max is not None:
            dt = dt.clamp(settings.dt_limit_min, settings.dt_limit_max)
        b, c = (t.unflatten(-1, (self.groups, settings.d_state)) for t in (b, c))
        return values.unflatten(-1, (self.heads, settings.head_dim)), dt, -self.A_log.exp(), b, c, self.D

    def _finish(self, y: Tensor, x: Tensor) -> Tensor:
        weight = self.norm.to(y.dtype).to(torch.promote_types(y.dtype, torch.float32))  # rounded as every norm's weight is
        return self.out(gated_rms_norm(y.flatten(2), self.z(x), weight, self.eps, self.groups))
