"""The contenders of `lctrain bench ssd`, each in a process of its own: ours, transformers' torch path, the recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lctrain.bench.documents import document_borders
from lctrain.bench.passes import Pass, timed_pass
from lctrain.config.bench_ssd import SsdBenchConfig
from lctrain.config.mamba import MambaConfig
from lctrain.config.model import ModelConfig
from lctrain.devices import DTYPES, gemm_flops
from lctrain.kernels.ssd import chunked, reference
from lctrain.models.mamba import Mamba2
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions
from lctrain.parallel.sequence import SequenceMeta
from lctrain.verify.blocks.compare import randomise
from lctrain.verify.blocks.mamba import transformers_mixer

Leaves = dict[str, Tensor]


class Contender:
    """One implementation of the problem; inputs and weights are a pure function of the settings."""

    def __init__(self, config: SsdBenchConfig, seq: int, name: str) -> None:
        if name == "transformers":  # imported before memory is looked at
            from transformers.models.mamba2 import modeling_mamba2  # noqa: F401
        self.config, self.seq, self.dtype = config, seq, DTYPES[config.dtype]
        self.positions = document_positions((document_borders(config, seq),) * config.batch, seq)
        make = self._layer if config.part == "layer" else self._scan
        self.leaves, self.forward = make(name)
        with torch.no_grad():
            shape = self.forward(self.leaves).shape
        self.dy = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed + 1)).to(self.dtype)

    def run(self) -> Pass:
        """One forward and backward pass."""
        return timed_pass(lambda: self.forward(self.leaves), self.dy, self.leaves.values())

    def results(self) -> dict[str, Any]:
        """y and all gradients of a pass, as numpy arrays."""
        self.run()
        found = {"y": self.forward(self.leaves).detach()}
        found |= {f"d{name}": leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        wanted = found if self.config.part == "scan" else {"y", "dx"}  # parameters of a layer have other names and shapes
        return {name: tensor.float().numpy() for name, tensor in found.items() if name in wanted}

    def gemm_flops(self) -> float:
        """Rate of a matrix product with this process's threads, FLOP/s."""
        return gemm_flops(torch.device("cpu"), self.dtype)

    def _scan(self, name: str) -> tuple[Leaves, Callable[[Leaves], Tensor]]:
        config, generator = self.config, torch.Generator().manual_seed(self.config.seed)
        rows, tokens = config.batch, self.seq

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        leaves = {
            "x": random(rows, tokens, config.heads, config.head_dim).to(self.dtype),
            "dt": torch.rand(rows, tokens, config.heads, generator=generator).mul_(0.1),
            "A": -1 - 15 * torch.rand(config.heads, generator=generator),
            "B": random(rows, tokens, config.groups, config.state).to(self.dtype),
            "C": random(rows, tokens, config.groups, config.state).to(self.dtype),
            "D": random(config.heads),
        }
        leaves = {key: leaf.requires_grad_() for key, leaf in leaves.items()}
        return leaves, self._scan_of(name)

    def _scan_of(self, name: str) -> Callable[[Leaves], Tensor]:
        config, resets = self.config, self.positions == 0

        def arguments(v: Leaves) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
            return v["x"], v["dt"], v["A"], v["B"], v["C"]

        if name == "recurrence":
            return lambda v: reference.ssd(*arguments(v), v["D"], resets=resets)[0]
        if name == "lctrain":
            return lambda v: chunked.ssd(*arguments(v), v["D"], resets=resets, chunk=config.chunk)[0]
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        torch_path = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
        return lambda v: torch_path(*arguments(v), chunk_size=config.their_chunk, D=v["D"]).to(self.dtype)

    def _layer(self, name: str) -> tuple[Leaves, Callable[[Leaves], Tensor]]:
        config = self.config
        mamba = MambaConfig(
            d_inner=config.heads * config.head_dim,
            head_dim=config.head_dim,
            d_state=config.state,
            n_groups=config.groups,
            chunk=config.their_chunk if name == "transformers" else config.chunk,
        )
        ours = Mamba2(ModelConfig(pattern="M", d_model=config.d_model, vocab_size=1, mamba=mamba))
        randomise(ours, config.seed)
        generator = torch.Generator().manual_seed(config.seed)
        x = torch.randn(config.batch, self.seq, config.d_model, generator=generator).to(self.dtype).requires_grad_()
        if name == "lctrain":
            borders = (document_borders(config, self.seq),) * config.batch
            seq = SequenceMeta(SequenceLayout("contiguous", 1, self.seq), RankGroup(), self.positions, borders)
            return {"x": x, **dict(ours.named_parameters())}, lambda v: ours(v["x"], seq)
        theirs = _twin(ours)

        def forward(v: Leaves) -> Tensor:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                return theirs(v["x"])

        return {"x": x, **dict(theirs.named_parameters())}, forward


@torch.no_grad()
def _twin(ours: Mamba2) -> torch.nn.Module:
    """transformers' layer with our weights."""
    theirs = transformers_mixer(ours, "mamba2")
    convs = (ours.conv_x, ours.conv_B, ours.conv_C)
    values = {
        "in_proj.weight": torch.cat([m.weight for m in (ours.z, ours.x, ours.B, ours.C, ours.dt)]),
        "conv1d.weight": torch.cat([conv.weight for conv in convs]).unsqueeze(1),
        "conv1d.bias": torch.cat([conv.bias for conv in convs if conv.bias is not None]),
        "norm.weight": ours.norm,
        "out_proj.weight": ours.out.weight,
        **{name: getattr(ours, name) for name in ("A_log", "D", "dt_bias")},
    }
    theirs.load_state_dict(values)
    return theirs
