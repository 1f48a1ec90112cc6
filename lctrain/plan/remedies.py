"""What would help a layout that does not fit: each change by itself, tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lctrain.config.deepspeed import zero_stage
from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError
from lctrain.plan.plan import Plan, make_plan
from lctrain.plan.variants import variant


class Remedy(NamedTuple):
    """A change, as a user would type it, and the plan with it; None where the config does not allow it, with the reason."""

    change: str
    plan: Plan | None
    refused: str = ""


def remedies(config: TrainConfig, reserve: float) -> list[Remedy]:
    """All changes that could make a rank hold less, tried one by one."""
    found = []
    for settings in _changes(config):
        change = " ".join(f"{name.replace('__', '.')}={str(value).lower()}" for name, value in settings.items())
        try:
            found.append(Remedy(change, make_plan(variant(config, **settings), reserve)))
        except UserError as error:
            found.append(Remedy(change, None, str(error)))
    return found


def _changes(config: TrainConfig) -> Iterator[dict[str, Any]]:
    engine, parallel = config.engine, config.parallel
    if engine.activation_checkpointing == "none":
        yield {"engine__activation_checkpointing": "layer"}
    if config.trainer.micro_batch > 1:
        yield {"trainer__micro_batch": config.trainer.micro_batch // 2}
    if engine.name == "torch" and engine.data_parallel == "ddp" and config.processes > 1:
        yield {"engine__data_parallel": "fsdp"}
    if engine.name == "deepspeed" and zero_stage(config) < 3 and parallel.pp == 1:
        yield {"engine__zero": 3}
    if engine.name == "megatron" and not engine.distributed_optimizer:
        yield {"engine__distributed_optimizer": True}
    yield {"parallel__cp": 2 * config.cp}
    if engine.name != "torch":
        yield {"parallel__tp": 2 * parallel.tp}
        yield {"parallel__pp": 2 * parallel.pp}
