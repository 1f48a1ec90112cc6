"""Where a run starts: at step 0, with random or given weights, or where a checkpoint left off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lctrain.checkpoint.rng import rng_state, set_rng_state
from lctrain.checkpoint.store import CheckpointStore
from lctrain.config.schema import TrainConfig
from lctrain.data.identity import check_data, data_identity
from lctrain.engines.base import Engine
from lctrain.errors import UserError
from lctrain.initial_weights import load_initial


def training_state(engine: Engine, rank: int) -> dict[str, Any]:
    """All that a checkpoint holds: weights, optimizer, random generators."""
    return {**engine.state(), "rng": rng_state(rank)}


def checkpoint_meta(config: TrainConfig, step: int) -> dict[str, Any]:
    """What a resume must know besides the state: finished steps, samples used, and what decides the order of samples."""
    return {"step": step, "consumed": step * config.trainer.global_batch, "data": data_identity(config)}


def resume(config: TrainConfig, store: CheckpointStore, engine: Engine, rank: int) -> tuple[int, Path | None]:
    """Restore the run as config.resume asks; returns finished steps and the checkpoint used. Collective.

    UserError if the checkpoint is damaged or made with another model, or if the config would continue with other samples than
    the run would have used.
    """
    newest = store.newest_verified() if config.resume in ("auto", "never") else Path(config.resume)
    if config.resume == "never" and newest is not None:
        raise UserError(f"resume=never, but run_dir={config.run_dir} has checkpoint {newest.name}; choose another run_dir")
    if newest is None:
        if config.init_from is not None:
            changes = load_initial(config, engine)
            if rank == 0:
                store.say(f"weights from {config.init_from}" + "".join(f"; {change}" for change in changes))
        return 0, None
    state = training_state(engine, rank)
    meta = store.load(newest, state)
    check_data(config, meta["data"], newest)
    engine.load_state(state)
    set_rng_state(state["rng"])
    return int(meta["step"]), newest
