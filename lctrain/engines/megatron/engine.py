"""engine=megatron: megatron-core's pipeline schedules, data parallelism and optimizer around our layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lctrain.adapters.megatron_cpu import megatron_on_cpu
from lctrain.attention_choice import attention_strategies
from lctrain.config.schema import TrainConfig
from lctrain.data.batch import MicroBatch, StepBatch
from lctrain.devices import DTYPES
from lctrain.engines.base import StepResult
from lctrain.engines.megatron.groups import group_collection
from lctrain.engines.megatron.optimizer import Optimizer, mark_parameters
from lctrain.engines.megatron.stage import Stage
from lctrain.engines.megatron.state import EngineState
from lctrain.engines.problem import describe_problem
from lctrain.models.build import build_model
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel, LossSums
from lctrain.models.moe.stats import balancers, forget_statistics, gather_statistics, update_biases
from lctrain.models.parallel import ModelParallel
from lctrain.models.piece import Piece, piece_ranges
from lctrain.models.place import Place, parameter_places
from lctrain.models.tensor_parallel import shard_length
from lctrain.optim import sum_of_bytes
from lctrain.parallel.mesh import MeshGroups, ProcessMesh
from lctrain.parallel.sequence import SequenceMeta


class MegatronEngine:
    """See lctrain.engines.base.Engine.

    Gradient contract: the last stage's backward starts from (sum of its token losses) / (targets of the global batch), and
    megatron adds up, without any factor of its own (`calculate_per_token_loss`, no token count), over the data- and
    context-parallel ranks, for experts over all ranks that hold a copy. Gradients are added and reduced in fp32.
    With bf16, weights and activations are bf16 and the optimizer has fp32 main weights.

    model: the whole model, without storage, for counts. pieces: this rank's stages, one unless the schedule is interleaved.
    """

    def __init__(self, config: TrainConfig, mesh: ProcessMesh, groups: MeshGroups, device: torch.device) -> None:
        self.config, self.mesh, self.groups, self.device = config, mesh, groups, device
        self.strategies = attention_strategies(config, device)
        self.model = build_model(config)
        self._has_mixtures = bool(balancers(self.model))
        self.collection = group_collection(mesh, groups)
        self.megatron_config = _megatron_config(config, mesh, len(self.model.layers))
        self.parallel = ModelParallel(groups.tp, groups.ep, groups.etp, groups.dp_cp)
        self.pieces = [
            Piece(config.model, DTYPES[config.engine.dtype], self._checkpointing, self.parallel, r) for r in self._ranges()
        ]
        self.parameters: dict[str, nn.Parameter] = {}
        self.places: dict[str, Place] = {}
        masters: dict[str, Tensor] = {}
        for piece in self.pieces:
            masters.update(self._allocate(piece))
        with megatron_on_cpu():
            self.chunks = [self._wrap(piece, index) for index, piece in enumerate(self.pieces)]
            self.optimizer = Optimizer(config, self.chunks, self.parameters, self.collection)
        for name, values in masters.items():
            self.optimizer.set_main(name, values)
        self._connect()
        self.states = EngineState(self)
        self.grad_norm = 0.0

    def backward(self, batch: StepBatch, targets: int) -> StepResult:
        """See Engine."""
        with megatron_on_cpu():
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.discard()
            sums = self._run(batch.micro_batches, 1 / max(1, targets))
            self.grad_norm = self.optimizer.grad_norm()
        losses = self._own_losses(sums, batch.micro_batches)
        total = torch.stack(losses).sum()
        if self.mesh.size > 1:
            dist.all_reduce(total)
        loss = float(total) / max(1, targets)
        problem = None
        if not math.isfinite(loss) or not math.isfinite(self.grad_norm):
            problem = describe_problem(self.mesh, batch, losses, loss, self.grad_norm)
        return StepResult(loss, self.grad_norm, problem, self._statistics())

    def gradients(self) -> dict[str, Tensor]:
        """See Engine."""
        return self.states.gradients()

    def update(self, lr: float) -> None:
        """See Engine."""
        with megatron_on_cpu():
            self.optimizer.update(lr, self.grad_norm)
        for piece in self.pieces:
            update_biases(piece)
        self.discard()

    def discard(self) -> None:
        """See Engine."""
        self.optimizer.discard()
        for piece in self.pieces:
            forget_statistics(piece)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> float:
        """See Engine."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        copies = self.mesh.pp * self.mesh.cp * self.mesh.tp  # ranks that all count the targets of whole rows
        for micro_batches, sums in self._evaluated(batches):
            totals[0] += torch.stack(self._own_losses(sums, micro_batches)).sum()
            totals[1] += sum(micro.targets for micro in micro_batches) / copies
        if self.mesh.size > 1:
            dist.all_reduce(totals)
        return float(totals[0] / totals[1]) if totals[1] else math.nan

    @torch.no_grad()
    def token_losses(self, batches: Iterable[MicroBatch]) -> list[Tensor]:
        """See Engine."""
        return [each.per_token for _, sums in self._evaluated(batches) for each in sums]

    def state(self) -> dict[str, Any]:
        """See Engine."""
        return self.states.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See Engine."""
        self.states.load(state)

    def models(self) -> list[LanguageModel]:
        """See Engine."""
        return list(self.pieces)

    def memory(self) -> dict[str, int]:
        """See Engine."""
        buffers = [buffer for chunk in self.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        return {
            "weights": sum_of_bytes(self.parameters.values()),
            "gradients": sum_of_bytes(buffer.grad_data for buffer in buffers),
            "optimizer": self.optimizer.memory(),
        }

    @property
    def _checkpointing(self) -> bool:
        return self.config.engine.activation_checkpointing == "layer"

    def _ranges(self) -> list[range]:
        """The sublayers of this rank's pieces: of all pieces in the order of layers, every pp-th from its own on."""
        pieces = self.mesh.pp * self.config.parallel.virtual_stages
        return piece_ranges(self.config, self.model, pieces)[self.mesh.pp_rank :: self.mesh.pp]

    def _allocate(self, piece: Piece) -> dict[str, Tensor]:
        """Storage and initial values; returns the fp32 values of what is then kept in bf16."""
        piece.to_empty(device=self.device)
        initialise(piece, self.config.trainer.seed)
        parameters, places = dict(piece.named_parameters()), parameter_places(piece)
        masters = {}
        for name, parameter in parameters.items():
            if piece.dtype == torch.bfloat16 and places[name].narrows:
                masters[name] = parameter.data
                parameter.data = parameter.data.to(piece.dtype)
        tied = self.config.model.tie_embeddings and self.mesh.pp > 1
        mark_parameters(parameters, places, tied_copy=not piece.first, tied=tied)
        self.parameters.update(parameters)
        self.places.update(places)
        return masters

    def _wrap(self, piece: Piece, index: int) -> DistributedDataParallel:
        trainer = self.config.trainer
        interleaved = self.config.parallel.virtual_stages > 1
        stage = Stage(self.megatron_config, piece, index if interleaved else None, trainer.loss_chunk, trainer.z_loss)
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            use_distributed_optimizer=self.config.engine.distributed_optimizer,
        )
        # Every bucket by itself: with disable_bucketing a piece's bf16 and fp32 weights are gathered in one coalesced call,
        # which gloo carries out in the first one's dtype.
        return DistributedDataParallel(self.megatron_config, settings, stage, pg_collection=self.collection)

    def _connect(self) -> None:
        """Give the schedules their hooks into data parallelism."""
        no_sync = [chunk.no_sync for chunk in self.chunks]
        self.megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.megatron_config.finalize_model_grads_func = _finalize
        self.schedule = get_forward_backward_func(self.mesh.pp, len(self.chunks) if len(self.chunks) > 1 else None)
        self.communicator = P2PCommunicator(self.collection.pp, self.megatron_config)

    def _evaluated(self, batches: Iterable[MicroBatch]) -> Iterator[tuple[tuple[MicroBatch, ...], list[LossSums]]]:
        """Forward passes over as many micro-batches at a time as an optimizer step has: interleaving needs their number."""
        per_pass = self.config.trainer.global_batch // (self.mesh.dp * self.config.trainer.micro_batch)
        rest = iter(batches)
        while micro_batches := tuple(itertools.islice(rest, per_pass)):
            with megatron_on_cpu():
                sums = self._run(micro_batches, 0.0, forward_only=True)
            yield micro_batches, sums

    def _run(self, micro_batches: tuple[MicroBatch, ...], weight: float, forward_only: bool = False) -> list[LossSums]:
        """All micro-batches through all stages, and back unless forward_only; the objective is multiplied by `weight`.

        Returns each micro-batch's sums on the ranks of the last stage, nothing elsewhere.
        """
        rows, length = micro_batches[0].tokens.shape
        iterators = [iter(micro_batches) for _ in self.chunks]
        sums: list[LossSums] = self.schedule(
            forward_step_func=partial(self._forward_step, weight),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            # what travels is [rows, tokens between sublayers, d_model]; megatron only takes its shape from these two
            seq_length=rows * self.mesh.cp,
            micro_batch_size=shard_length(length, self.mesh.tp),
            forward_only=forward_only,
            p2p_communicator=self.communicator,
            pg_collection=self.collection,
        )
        return sums

    def _own_losses(self, sums: list[LossSums], micro_batches: tuple[MicroBatch, ...]) -> list[Tensor]:
        """Each micro-batch's cross-entropy, fp64, on the ranks that count it, and zeros on all others."""
        if sums and self.mesh.tp_rank == 0:
            return [each.cross_entropy for each in sums]
        return [torch.zeros((), dtype=torch.float64, device=self.device) for _ in micro_batches]

    def _statistics(self) -> dict[str, Any]:
        """Metrics of the mixtures of all stages, in the order of layers. Collective."""
        own = [gather_statistics(piece, piece.parallel) for piece in self.pieces]
        stages = [own]
        if self.mesh.pp > 1 and self._has_mixtures:
            stages = [[] for _ in range(self.mesh.pp)]
            dist.all_gather_object(stages, own, group=self.collection.pp)
        merged: dict[str, Any] = {}
        for index in range(len(self.pieces)):
            for stage in stages:
                for name, values in stage[index].items():
                    merged.setdefault(name, []).extend(values)
        return merged

    def _forward_step(self, weight: float, micro_batches: Iterator[MicroBatch], chunk: DistributedDataParallel) -> Any:
        micro = next(micro_batches)
        tokens, labels, positions = (
            x.to(self.device, non_blocking=True) for x in (micro.tokens, micro.labels, micro.positions)
        )
        share = tokens.shape[0] / self.config.trainer.global_batch  # of the micro-batch in the step
        seq = SequenceMeta(
            micro.layout,
            self.groups.cp,
            positions,
            micro.borders,
            self.strategies,
            side_loss_scale=share,
            samples=micro.samples,
            tasks=micro.tasks,
        )
        output = chunk(tokens, labels, seq)
        if not isinstance(output, LossSums):
            return output, None
        nothing = torch.zeros((), dtype=torch.int, device=self.device)  # no token count: the loop knows it already
        sums = LossSums(*(part.detach() for part in output))
        return output.objective, lambda objective: (objective * weight, nothing, sums)


def _finalize(chunks: list[DistributedDataParallel], _tokens: Tensor | None, pg_collection: Any, **_: Any) -> None:
    finalize_model_grads(chunks, None, pg_collection=pg_collection)


def _megatron_config(config: TrainConfig, mesh: ProcessMesh, depth: int) -> TransformerConfig:
    """What schedules and data parallelism read of a TransformerConfig; our layers have settings of their own."""
    interleaved = config.parallel.virtual_stages > 1
    dtype = DTYPES[config.engine.dtype]
    return TransformerConfig(
        num_layers=max(depth, mesh.pp * config.parallel.virtual_stages) * mesh.pp * config.parallel.virtual_stages,
        hidden_size=config.model.d_model,
        num_attention_heads=mesh.tp,
        kv_channels=1,
        tensor_model_parallel_size=mesh.tp,
        pipeline_model_parallel_size=mesh.pp,
        context_parallel_size=mesh.cp,
        virtual_pipeline_model_parallel_size=config.parallel.virtual_stages if interleaved else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        # With batch_p2p_comm the interleaved schedule's gradients are wrong (0.16.1); one after the other needs it for order.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Freed while an overlapped send may still read it; a GPU's stream keeps that in order, gloo does not.
        deallocate_pipeline_outputs=not interleaved or torch.cuda.is_available(),
    )
