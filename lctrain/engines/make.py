"""From a config's engine name to the engine; the libraries of the others are not imported."""

from __future__ import annotations

import torch

from lctrain.config.schema import TrainConfig
from lctrain.engines.base import Engine
from lctrain.engines.quiet import quiet_libraries
from lctrain.parallel.mesh import MeshGroups, ProcessMesh


def make_engine(config: TrainConfig, mesh: ProcessMesh, groups: MeshGroups, device: torch.device) -> Engine:
    """The engine that config.engine.name asks for. Collective."""
    if config.engine.name != "torch":
        quiet_libraries()
    if config.engine.name == "megatron":
        from lctrain.engines.megatron.engine import MegatronEngine

        return MegatronEngine(config, mesh, groups, device)
    if config.engine.name == "deepspeed" and mesh.pp > 1:
        from lctrain.engines.deepspeed.pipeline import PipelineEngine

        return PipelineEngine(config, mesh, groups, device)
    if config.engine.name == "deepspeed":
        from lctrain.engines.deepspeed.engine import ZeroEngine

        return ZeroEngine(config, mesh, groups, device)
    from lctrain.engines.torch_engine import TorchEngine

    return TorchEngine(config, mesh, groups, device)
