"""A pipeline stage as DeepSpeed's PipelineModule sees it: one layer, which is a piece of our model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from lctrain.config.schema import TrainConfig
from lctrain.devices import DTYPES
from lctrain.models.init import initialise
from lctrain.models.model import LossSums
from lctrain.models.parallel import ModelParallel
from lctrain.models.piece import Piece
from lctrain.parallel.mesh import ProcessMesh
from lctrain.parallel.sequence import SequenceMeta


class StagePiece(Piece):
    """Takes tokens or the activations of the stage before, gives activations or, last, the objective times `weight`.

    A pipeline hands on nothing but activations, so everything else about a micro-batch waits here: a stage sees the
    micro-batches of a step in their order, whatever it does between them.

    coming: labels and SequenceMeta of the micro-batches to come. sums: what the last stage found for those that have passed.
    """

    def __init__(self, config: TrainConfig, parallel: ModelParallel, layers: range, device: torch.device) -> None:
        checkpointing = config.engine.activation_checkpointing == "layer"
        super().__init__(config.model, DTYPES[config.engine.dtype], checkpointing, parallel, layers)
        self.to_empty(device=device)
        initialise(self, config.trainer.seed)
        self.loss_chunk, self.z_weight = config.trainer.loss_chunk, config.trainer.z_loss
        self.coming: Iterator[tuple[Tensor, SequenceMeta]] = iter(())
        self.weight = 1.0
        self.sums: list[LossSums] = []

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """int64 [B, T] or [B, S, d_model] -> [B, S, d_model] or a scalar."""
        labels, seq = next(self.coming)
        x = self.run(self.embed(x) if self.first else x, seq)
        if not self.last:
            return x.contiguous()
        sums = self.loss(x, labels, seq, self.loss_chunk, self.z_weight)
        self.sums.append(LossSums(*(value.detach() for value in sums)))
        return sums.objective * self.weight


class Stages(PipelineModule):
    """All stages, of which DeepSpeed builds this rank's own. Collective.

    own: this rank's.
    """

    def __init__(
        self, config: TrainConfig, mesh: ProcessMesh, parallel: ModelParallel, ranges: list[range], device: torch.device
    ) -> None:
        layers = [LayerSpec(StagePiece, config, parallel, layers, device) for layers in ranges]
        topology = PipeModelDataParallelTopology(mesh.pp, mesh.tp, mesh.dp * mesh.cp)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its partition
            super().__init__(layers, topology=topology, partition_method="uniform")
        self._ends: Any = None
        if config.model.tie_embeddings:
            for ranks in mesh.partition("pp"):
                group = dist.new_group([ranks[0], ranks[-1]])
                if mesh.rank in (ranks[0], ranks[-1]):
                    self._ends = group

    @property
    def own(self) -> StagePiece:
        """This rank's stage."""
        (piece,) = self.forward_funcs
        assert isinstance(piece, StagePiece)
        return piece

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, Any]]:
        """DeepSpeed sums the gradients of these before it averages over data-parallel ranks."""
        return [] if self._ends is None else [(self.own.embedding, self._ends)]
