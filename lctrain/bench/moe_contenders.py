"""The contenders of `lctrain bench moe`, each in a process of its own: ours, loops over experts, a dense network.

loop: what one writes without a grouped product. For sorted rows, products of slices x[a:b] with weight[e] and a concatenation;
for a whole layer, transformers' form, which picks each expert's tokens by index and adds the results into place. Autograd fills
a gradient of the whole weight with zeros for every expert there. split: the careful loop over sorted rows, x.split and
weight.unbind, whose gradients are put together once. dense: the same floating-point operations in products as large as the
machine likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.bench.documents import document_borders
from lctrain.bench.passes import Pass, timed_pass
from lctrain.config.bench_moe import MoeBenchConfig
from lctrain.config.model import MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig
from lctrain.devices import DTYPES
from lctrain.models.mlp import Mlp
from lctrain.models.moe.moe import MixtureOfExperts
from lctrain.models.parallel import ModelParallel
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions
from lctrain.parallel.sequence import SequenceMeta
from lctrain.verify.blocks.compare import randomise


class Contender:
    """One implementation of the problem; inputs, weights and choices are a pure function of the settings."""

    def __init__(self, config: MoeBenchConfig, seq: int, experts: int, name: str) -> None:
        self.config, self.seq, self.dtype = config, seq, DTYPES[config.dtype]
        moe = MoeConfig(n_experts=experts, top_k=config.top_k, d_ff=config.d_ff, balance=BalanceConfig(switch=0.0))
        self.model = ModelConfig(pattern="E", d_model=config.d_model, vocab_size=1, moe=moe)
        tokens = config.batch * seq
        rows = tokens * config.top_k if config.part == "experts" else tokens
        generator = torch.Generator().manual_seed(config.seed)
        self.x = torch.randn(rows, config.d_model, generator=generator).to(self.dtype).requires_grad_()
        self.dy = torch.randn(rows, config.d_model, generator=generator).to(self.dtype)
        drawn = torch.randint(experts, (rows,), generator=generator)  # uneven by chance, as after good balancing
        self.counts = torch.bincount(drawn, minlength=experts)
        self.module, self.forward = self._make(name)

    def run(self) -> Pass:
        """One forward and backward pass."""
        return timed_pass(lambda: self.forward(self.x), self.dy, (self.x, *self.module.parameters()))

    def results(self) -> dict[str, Any]:
        """y and the gradients of a pass, as numpy arrays."""
        self.run()
        found = {"y": self.forward(self.x).detach(), "x": self.x.grad}
        found |= {name: parameter.grad for name, parameter in self.module.named_parameters()}
        return {name: tensor.float().numpy() for name, tensor in found.items() if tensor is not None}

    def _make(self, name: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        config, whole = self.config, self.config.part == "layer"
        if name == "dense":
            d_ff = config.d_ff * (config.top_k if whole else 1)
            mlp = Mlp(self.model.model_copy(update={"mlp": MlpConfig(d_ff=d_ff)}))
            randomise(mlp, config.seed)
            return mlp, lambda x: mlp.decode(x, None)
        layer = MixtureOfExperts(self.model, ModelParallel())
        randomise(layer, config.seed)
        if not whole:
            ends = self.counts.cumsum(0).to(torch.int32)
            if name == "lctrain":
                return layer.experts, lambda x: layer.experts(x, ends)
            loop = _split if name == "split" else _slices
            return layer.experts, lambda x: loop(layer, x, self.counts.tolist())
        if name == "loop":
            return layer, lambda x: _indexed(layer, x)
        borders = (document_borders(config, self.seq),) * config.batch
        positions = document_positions(borders, self.seq)
        meta = SequenceMeta(SequenceLayout("contiguous", 1, self.seq), RankGroup(), positions, borders)
        return layer, lambda x: layer(x.view(config.batch, self.seq, -1), meta).flatten(0, 1)


def _slices(layer: MixtureOfExperts, x: Tensor, counts: list[int]) -> Tensor:
    """Products of slices with one expert's weights each, then a concatenation."""
    experts, parts, start = layer.experts, [], 0
    assert experts.gate is not None
    for expert, count in enumerate(counts):
        rows = x[start : start + count]
        gate, up, down = (w[expert].to(x.dtype) for w in (experts.gate, experts.up, experts.down))
        parts.append(F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down))
        start += count
    return torch.cat(parts)


def _split(layer: MixtureOfExperts, x: Tensor, counts: list[int]) -> Tensor:
    """The same with rows and weights taken apart at once, so that their gradients are put together at once."""
    experts = layer.experts
    assert experts.gate is not None
    weights = zip(*(w.to(x.dtype).unbind() for w in (experts.gate, experts.up, experts.down)), strict=True)
    return torch.cat(
        [
            F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            for rows, (gate, up, down) in zip(x.split(counts), weights, strict=True)
        ]
    )


def _indexed(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """transformers' loop: the tokens of each expert by index, results added into place."""
    experts = layer.experts
    assert experts.gate is not None
    routing = layer.router(x, torch.zeros(len(x), dtype=torch.int64), None, None)
    weights, y = routing.weights.to(x.dtype), torch.zeros_like(x)
    for expert in range(layer.settings.n_experts):
        tokens, choice = torch.where(routing.experts == expert)
        rows = x[tokens]
        gate, up, down = (w[expert].to(x.dtype) for w in (experts.gate, experts.up, experts.down))
        hidden = F.silu(F.linear(rows, gate)) * F.linear(rows, up)
        y = y.index_add(0, tokens, F.linear(hidden, down) * weights[tokens, choice, None])
    return y
