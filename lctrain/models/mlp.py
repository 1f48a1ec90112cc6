"""Feed-forward network: the mixer `-`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.schema import ModelConfig
from lctrain.kernels.swiglu.fused import swiglu_linear
from lctrain.models.layers import Linear
from lctrain.parallel.mask import Borders
from lctrain.parallel.sequence import SequenceMeta


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020), GELU (tanh form) or squared ReLU (So et al. 2021), token by token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settings = config.mlp
        self.activation = settings.activation
        self.gate = Linear(config.d_model, settings.d_ff, settings.bias) if self.activation == "swiglu" else None
        self.up = Linear(config.d_model, settings.d_ff, settings.bias)
        self.down = Linear(settings.d_ff, config.d_model, settings.bias, residual=True)

    def forward(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, T, d_model] -> same shape; `seq` is not needed."""
        return self._compute(x)

    def new_state(self) -> None:
        """No state: tokens do not mix here."""

    def decode(self, x: Tensor, state: None) -> Tensor:
        """The newest tokens x [B, S, d_model]."""
        return self._compute(x)

    def flops(self, documents: tuple[Borders, ...]) -> int:
        """Multiply-adds x 2 of one forward pass over whole sequences with these documents."""
        tokens = sum(borders[-1] for borders in documents)
        return 2 * tokens * sum(m.weight.numel() for m in (self.gate, self.up, self.down) if m is not None)

    def _compute(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            y = swiglu_linear(self.gate(x), self.up(x), self.down.weight)
            return y if self.down.bias is None else y + self.down.bias.to(y.dtype)
        hidden = self.up(x)
        return self.down(F.gelu(hidden, approximate="tanh") if self.activation == "gelu" else F.relu(hidden).square())
