"""Rehearsal: one rank's model code runs on tensors without data, and what it does is counted.

The parts are one sublayer of every kind, the embedding, and the last norm with the head and the loss. Nothing here knows what
any of them computes, so a new mixer or strategy is priced as soon as it exists.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

from lctrain.attention_choice import attention_strategies
from lctrain.config.schema import TrainConfig
from lctrain.devices import DTYPES
from lctrain.engines.quiet import quiet_libraries
from lctrain.errors import UserError
from lctrain.models.model import LanguageModel, Sublayer
from lctrain.models.moe.stats import forget_statistics
from lctrain.models.moe.tokens import shard_tokens
from lctrain.models.parallel import ModelParallel
from lctrain.models.pattern import parse_pattern
from lctrain.models.place import parameter_places
from lctrain.models.registry import TOKEN_MIXERS
from lctrain.models.tensor_parallel import shard_length
from lctrain.parallel.deal import make_layout
from lctrain.parallel.layout import document_positions
from lctrain.parallel.mesh import MeshGroups
from lctrain.parallel.sequence import SequenceMeta
from lctrain.plan.cost import PartCost
from lctrain.plan.counted_group import counted, direct_dimensions
from lctrain.plan.counting import CostCounter
from lctrain.plan.fake_world import fake_world
from lctrain.plan.stand_ins import attention_marked, known, shapes_suffice

EMBEDDING, LOSS = "embedding", "loss"
"""Names of the parts that are no sublayers."""

RECURRENT = ("M", "L")
"""Symbols of mixers that have no masks."""


def rehearse(config: TrainConfig, length: int | None = None, on_cuda: bool = True) -> dict[str, PartCost]:
    """What every part costs rank 0 of a pipeline stage, over one micro-batch whose rows are one document each.

    Args:
        length: tokens of a row; None: trainer.seq_len.
        on_cuda: take the ways that the code takes on a GPU, and not those for CPUs.

    Returns:
        By symbol of the pattern, and "embedding" and "loss". Attention's own messages are dimension "cp", collective
        "attention". What all sublayers share of a micro-batch, such as rotary angles, is in the embedding's `kept`.
    """
    check_rehearsable(config)
    if config.engine.name != "torch":
        quiet_libraries()
    with fake_world(config.processes):
        groups = config.mesh(0, config.processes).make_groups()
        counter = CostCounter(direct_dimensions(groups))
        groups = counted(groups, counter)
        seq = make_sequence(config, groups, length or config.trainer.seq_len, torch.device("meta"))
        with shapes_suffice(counter, on_cuda, tensor_parallel=config.parallel.tp > 1):
            return Rehearsal(config, build(config, groups, torch.device("meta")), seq, counter).parts()


def check_rehearsable(config: TrainConfig) -> None:
    """UserError for what cannot be known without data."""
    factor = config.model.moe.capacity_factor
    if "E" in config.model.pattern and factor is not None and factor < 1:
        raise UserError(
            f"model.moe.capacity_factor={factor:g} drops choices even of a router that uses all experts alike, so what a plan"
            " assumes would not hold: plan with 1 or more"
        )


def make_sequence(config: TrainConfig, groups: MeshGroups, length: int, device: torch.device) -> SequenceMeta:
    """A micro-batch of whole rows of one document each, as the engines describe it to layers."""
    rows = config.trainer.micro_batch
    borders = ((0, length),) * rows
    layout = make_layout(config.parallel.layout, config.cp, length, borders)
    positions = layout.shard(document_positions(borders, length), groups.cp.rank, 1, 0)
    strategies = attention_strategies(config, torch.device("cpu"))
    facts: dict[str, Any] = {"samples": tuple(range(rows)), "tasks": ((0,),) * rows}
    seq = SequenceMeta(layout, groups.cp, positions.to(device), borders, strategies, **facts)
    part = shard_length(layout.local_length, groups.tp.size), groups.tp.rank
    seq.once(("tokens", *part, device), lambda: known(shard_tokens(seq, *part), device))
    return seq


def build(config: TrainConfig, groups: MeshGroups, device: torch.device) -> LanguageModel:
    """A model with one sublayer of every kind, its weights in the dtypes and with the gradients that the engine gives them."""
    symbols = dict.fromkeys(layer.symbol for layer in parse_pattern(config.model.pattern))
    dtype, checkpointing = DTYPES[config.engine.dtype], config.engine.activation_checkpointing == "layer"
    parallel = ModelParallel(groups.tp, groups.ep, groups.etp, groups.dp_cp)
    with device:
        model = LanguageModel(config.model.model_copy(update={"pattern": "".join(symbols)}), dtype, checkpointing, parallel)
    places = parameter_places(model)
    for name, parameter in model.named_parameters():
        if config.engine.name != "megatron":
            parameter.grad = torch.zeros_like(parameter)
            continue
        if dtype == torch.bfloat16 and places[name].narrows:
            parameter.data = parameter.data.to(dtype)
        total = torch.zeros(parameter.shape, device=device)
        parameter.register_post_accumulate_grad_hook(_adds_to(total))
    return model


def _adds_to(total: Tensor) -> Any:
    """What megatron-core's data parallelism does with a micro-batch's gradient."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add


class Rehearsal:
    """Runs the parts of a model one by one; with real or fake tensors, among real or fake ranks."""

    def __init__(self, config: TrainConfig, model: LanguageModel, seq: SequenceMeta, counter: CostCounter) -> None:
        self.config, self.model, self.seq, self.counter = config, model, seq, counter
        self.device = seq.positions.device
        self.rows, self.tokens = seq.positions.shape
        self._wanted = torch.zeros((), device=self.device, requires_grad=True)
        self._nothing = {dtype: torch.zeros((), dtype=dtype, device=self.device) for dtype in DTYPES.values()}
        self.ids = torch.zeros_like(seq.positions)
        self.shape = (self.rows, shard_length(self.tokens, model.parallel.tp.size), config.model.d_model)

    def parts(self) -> dict[str, PartCost]:
        """All of them."""
        found = {}
        with self.counter, attention_marked(self.counter):
            symbols = [spec.symbol for spec in parse_pattern(self.model.config.pattern)]
            for symbol, layer in zip(symbols, self.model.layers, strict=True):
                if symbol in TOKEN_MIXERS:
                    self._share(symbol, layer)
                before = self.counter.live
                found[symbol] = self._part(symbol, layer)
                assert self.counter.live == before, f"{symbol} leaves {self.counter.live - before} bytes behind"
            shared = self.counter.live
            embedding = self._part(EMBEDDING, None)
            found[EMBEDDING] = dataclasses.replace(embedding, kept=embedding.kept + shared)
            found[LOSS] = self._part(LOSS, None)
        return found

    def _share(self, symbol: str, layer: Sublayer) -> None:
        """A pass that makes what all layers share: rotary angles and starts of documents, and masks, some only in backward."""
        if symbol in RECURRENT:
            with torch.no_grad():
                self.model.through(layer, self._input(symbol), self.seq)
        else:
            self._part(symbol, layer)

    def _part(self, name: str, layer: Sublayer | None) -> PartCost:
        """Forward and backward pass of one part between other parts, which hold nothing of what passes between them."""
        counter, known = self.counter, self.counter.live
        results: list[Tensor] = []
        x = self._input(name)
        begun, alive = counter.live, weakref.ref(x.untyped_storage())
        counter.begin()
        y = self._run(name, layer, _Entrance.apply(x, self._wanted, results))
        passed, edge = y.nbytes, torch.autograd.graph.get_gradient_edge(_Exit.apply(y))
        shape, dtype = y.shape, y.dtype
        del x, y
        kept = counter.live - known
        forward = counter.cost(held=known + kept if alive() is not None else begun + kept)
        counter.begin()
        torch.autograd.backward([edge], [self._nothing[dtype].expand(shape)])
        backward = counter.cost(held=known + kept + passed)
        del edge
        results.clear()
        forget_statistics(self.model)
        return PartCost(name, forward, backward, kept)

    def _input(self, name: str) -> Tensor:
        return torch.empty(() if name == EMBEDDING else self.shape, dtype=self.model.dtype, device=self.device)

    def _run(self, name: str, layer: Sublayer | None, x: Tensor) -> Tensor:
        if layer is not None:
            return self.model.through(layer, x, self.seq)
        if name == EMBEDDING:
            return self.model.embed(self.ids)
        trainer = self.config.trainer
        return self.model.loss(x, self.ids, self.seq, trainer.loss_chunk, trainer.z_loss).objective


class _Entrance(torch.autograd.Function):
    """Where the part before would hand over its result; its gradient ends in `results`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, wanted: Tensor, results: list[Tensor]) -> Tensor:
        ctx.results = results
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, ...]:
        ctx.results.append(dx)
        return None, None, None


class _Exit(torch.autograd.Function):
    """Where the part after would take the result, and make a gradient that nobody else holds."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
