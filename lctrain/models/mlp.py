"""Feed-forward network: the mixer `-`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.model import ModelConfig
from lctrain.kernels.swiglu.fused import swiglu_linear
from lctrain.models.parallel import ModelParallel
from lctrain.models.tensor_parallel import column_linear, gather_tokens, row_linear
from lctrain.parallel.mask import Borders
from lctrain.parallel.sequence import SequenceMeta


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020), GELU (tanh form) or squared ReLU (So et al. 2021), token by token."""

    def __init__(self, config: ModelConfig, parallel: ModelParallel | None = None) -> None:
        super().__init__()
        self.parallel = parallel = parallel or ModelParallel()
        settings = config.mlp
        d_model, d_ff, bias = config.d_model, settings.d_ff, settings.bias
        self.activation = settings.activation
        self.gate = column_linear(parallel, d_model, d_ff, bias) if self.activation == "swiglu" else None
        self.up = column_linear(parallel, d_model, d_ff, bias)
        self.down = row_linear(parallel, d_ff, d_model, bias)

    def forward(self, x: Tensor, seq: SequenceMeta) -> Tensor:
        """x [B, T, d_model] -> same shape."""
        return self._compute(gather_tokens(self.parallel, x, seq))

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
            return self.down.finish(swiglu_linear(self.gate(x), self.up(x), self.down.weight))
        hidden = self.up(x)
        return self.down(F.gelu(hidden, approximate="tanh") if self.activation == "gelu" else F.relu(hidden).square())
