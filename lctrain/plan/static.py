"""What a rank holds whatever it works on: weights, gradients and optimizer state, as Engine.memory() counts them.

The torch and DeepSpeed engines divide a model's parameters by rules that are short enough to be written down. megatron-core's
depend on its buffers' padding and buckets, so there the engine itself is built, of tensors without data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lctrain.config.deepspeed import checked_config, zero_stage
from lctrain.config.schema import TrainConfig
from lctrain.devices import DTYPES
from lctrain.engines.quiet import quiet_libraries
from lctrain.models.build import build_model
from lctrain.models.model import LanguageModel
from lctrain.models.parallel import ModelParallel
from lctrain.models.piece import Piece, piece_ranges
from lctrain.models.place import Family, own_share, parameter_places
from lctrain.parallel.mesh import MeshGroups, ProcessMesh
from lctrain.plan.cost import FP32, StaticMemory
from lctrain.plan.fake_world import fake_world

ALIGNMENT = 2
"""DeepSpeed's ZeRO 1 and 2 pad the parameters of an optimizer group to a multiple of this many for every rank."""

SUB_GROUP = 10**9
"""Elements after which DeepSpeed's ZeRO-3 begins another flat tensor, unless its config says otherwise."""


def static_memory(config: TrainConfig, stage: int) -> StaticMemory:
    """Of the first rank of a pipeline stage, from its first optimizer step on."""
    mesh = config.mesh(0, config.processes)
    assert 0 <= stage < mesh.pp, (stage, mesh)
    rank = stage * mesh.stage_size
    if config.engine.name != "torch":
        quiet_libraries()
    with fake_world(mesh.size, rank):
        mesh = config.mesh(rank, mesh.size)
        groups = mesh.make_groups()
        if config.engine.name == "megatron":
            return _megatron(config, mesh, groups)
        model = _model(config, mesh, groups)
        if config.engine.name == "torch":
            return _torch(config, mesh, model)
        return _deepspeed(config, mesh, model)


def _model(config: TrainConfig, mesh: ProcessMesh, groups: MeshGroups) -> LanguageModel:
    """What this rank computes with, without storage."""
    parallel = ModelParallel(groups.tp, groups.ep, groups.etp, groups.dp_cp)
    if mesh.pp == 1:
        return build_model(config, parallel)
    own = piece_ranges(config, build_model(config), mesh.pp)[mesh.pp_rank]
    return Piece(config.model, DTYPES[config.engine.dtype], False, parallel, own)


def _torch(config: TrainConfig, mesh: ProcessMesh, model: LanguageModel) -> StaticMemory:
    """FSDP divides every parameter's rows over all ranks, those of experts over the ranks that would hold copies."""
    places = parameter_places(model)
    weights = tensors = 0
    for name, parameter in model.named_parameters():
        ranks = 1
        if config.engine.data_parallel == "fsdp":
            ranks = mesh.edp if mesh.ep > 1 and "ep" in places[name].cuts else mesh.size
        weights += FP32 * len(own_share(len(parameter), ranks, 0)) * (parameter.numel() // len(parameter))
        tensors += 1
    return StaticMemory(weights, weights, 2 * weights + FP32 * tensors)


def _deepspeed(config: TrainConfig, mesh: ProcessMesh, model: LanguageModel) -> StaticMemory:
    zero = zero_stage(config)
    groups = _optimizer_groups(config, mesh, model)
    weights = FP32 * sum(x.numel() for x in model.parameters())
    if zero == 0:
        return StaticMemory(weights, weights, 2 * weights + FP32 * sum(len(parameters) for parameters, _ in groups))
    if zero < 3:
        held = sum(-(-_elements(x) // (ALIGNMENT * ranks)) * ALIGNMENT for x, ranks in groups)
        masters, tensors = FP32 * held, len(groups)
        return StaticMemory(weights, masters if zero == 2 else weights, 3 * masters + FP32 * tensors)
    given = checked_config(config).get("zero_optimization", {})
    limit = int(given.get("sub_group_size", SUB_GROUP))
    tensors = held = 0
    for parameters, ranks in groups:
        shares = [-(-x.numel() // ranks) for x in parameters]
        held += sum(shares)
        tensors += _sub_groups(shares, limit)
    masters = FP32 * held
    return StaticMemory(masters, masters, 3 * masters + FP32 * tensors)


def _optimizer_groups(config: TrainConfig, mesh: ProcessMesh, model: LanguageModel) -> list[tuple[list[Tensor], int]]:
    """Parameters that DeepSpeed's optimizer treats together, and over how many ranks it divides them."""
    places = parameter_places(model)
    apart = mesh.ep * mesh.etp * mesh.tp > 1  # see lctrain.engines.deepspeed.experts
    found: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        expert = apart and places[name].family is Family.EXPERT
        found.setdefault((places[name].decays(parameter), expert), []).append(parameter)
    return [(parameters, mesh.edp if expert else mesh.dp * mesh.cp) for (_, expert), parameters in found.items()]


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() for x in tensors)


def _sub_groups(shares: list[int], limit: int) -> int:
    """Flat tensors that ZeRO-3 lays some parameters into: each is closed by the parameter that fills it."""
    if sum(shares) <= limit:
        return 1
    closed = filled = 0
    for share in shares[:-1]:
        filled += share
        if filled >= limit:
            closed, filled = closed + 1, 0
    return closed + 1


def _megatron(config: TrainConfig, mesh: ProcessMesh, groups: MeshGroups) -> StaticMemory:
    from lctrain.engines.megatron.engine import MegatronEngine

    def gather_object(found: list[Any], mine: Any, group: Any = None) -> None:
        found[:] = [mine] * len(found)

    with (
        FakeTensorMode(),
        patch("torch.cuda.is_available", lambda: False),  # also where there is a GPU: fake tensors of a CPU do
        patch("lctrain.engines.megatron.engine.initialise", lambda *_: None),
        patch.object(Piece, "to_empty", _to_empty),
        patch("torch.distributed.all_gather_object", gather_object),
    ):
        return StaticMemory(**MegatronEngine(config, mesh, groups, torch.device("cpu")).memory())


def _to_empty(module: nn.Module, device: torch.device) -> nn.Module:
    """nn.Module.to_empty for fake tensors, which its own way to replace parameters refuses."""
    for each in module.modules():
        for name, old in each._parameters.items():
            if old is not None:
                new = nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device=device))
                vars(new).update({key: value for key, value in vars(old).items() if key not in vars(new)})
                each._parameters[name] = new
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return module
