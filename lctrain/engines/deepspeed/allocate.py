"""Storage and first values of a model that DeepSpeed is to shard: with ZeRO-3, never whole on any rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lctrain.engines.deepspeed.experts import Experts
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel


def allocate(model: LanguageModel, seed: int, device: torch.device, experts: Experts) -> None:
    """All of a model without storage, for stages that do not shard weights."""
    model.to_empty(device=device)
    initialise(model, seed)
    experts.mark(model.get_parameter(name) for name in experts.names)


def allocate_shards(
    model: LanguageModel, seed: int, device: torch.device, experts: Experts, settings: dict[str, Any], mpu: Any
) -> None:
    """One sublayer after the other: storage, values, and then this rank's shard alone. Collective."""
    from deepspeed import zero

    prefixes = {module: prefix for prefix, module in model.named_modules()}
    own = (model.norm, *([] if model.head is None else [model.head]))
    chunks: list[tuple[nn.Module, bool]] = [(model, False), *((module, True) for module in (*own, *model.layers))]
    for chunk, recurse in chunks:
        chunk.to_empty(device=device, recurse=recurse)
        prefix = f"{prefixes[chunk]}." if prefixes[chunk] else ""
        names = {f"{prefix}{name}" for name, _ in chunk.named_parameters(recurse=recurse)}
        initialise(model, seed, names)
        experts.mark(model.get_parameter(name) for name in sorted(names & experts.names))
        holder = chunk if recurse else _only(dict(chunk.named_parameters(recurse=False)))
        zero.Init(module=holder, data_parallel_group=mpu.get_data_parallel_group(), config_dict_or_path=settings, mpu=mpu)


def _only(parameters: dict[str, nn.Parameter]) -> nn.Module:
    holder = nn.Module()
    for name, parameter in parameters.items():
        holder.register_parameter(name, parameter)
    return holder
