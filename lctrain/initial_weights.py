"""`init_from`: a run that starts from the weights of a model, with data, layout and learning rate of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lctrain.checkpoint.agree import agreed, from_rank_0
from lctrain.config.convert import ConvertConfig
from lctrain.config.model import ModelConfig
from lctrain.config.schema import TrainConfig
from lctrain.convert.formats import open_input, open_ours
from lctrain.convert.function import differences
from lctrain.convert.mapping import Translated, WeightMap
from lctrain.convert.native import is_native
from lctrain.convert.opened import Opened, UnknownModel
from lctrain.convert.stream import Source
from lctrain.engines.base import Engine
from lctrain.errors import UserError

MAY_CHANGE = (".rope.", "attention.window", "vocab_size", "moe.capacity_factor", "moe.balance.bias_rate")
"""What may be another in the run than in the model it starts from: how far it sees, rows for more tokens, how experts are kept
even. None of it has weights that would not fit."""


def open_weights(path: str, checked: bool = True) -> Opened:
    """The weights of a model folder, run, checkpoint, Hugging Face model, or whatever else `lctrain convert` reads.

    checked: whether a training checkpoint's files are compared with their hashes first.
    """
    if not Path(path).exists():
        raise UserError(f"init_from={path} does not exist: name a model folder, a run, a checkpoint or a Hugging Face model")
    options = ConvertConfig(to="lctrain", input=path)
    try:
        return open_ours(Path(path), options, checked) if is_native(Path(path)) else open_input(options)[1]
    except UnknownModel:
        raise UserError(
            f"init_from={path} does not say what model it is: convert it first with lctrain convert to=lctrain input={path}"
            " config=FILE.yaml output=FOLDER, where FILE.yaml has the model's settings"
        ) from None


def check_initial(config: TrainConfig) -> list[str]:
    """What the run changes of the model that it starts from, one line each; UserError that names what it may not change."""
    assert config.init_from is not None
    opened = open_weights(config.init_from)
    if opened.unmatched:
        raise UserError(f"init_from={config.init_from} has {opened.unmatched[0]}, which its own config does not ask for")
    return compare_models(config.model, opened.config, config.init_from)


def compare_models(model: ModelConfig, stored: ModelConfig, path: str) -> list[str]:
    """See check_initial."""
    told = []
    for name, (wanted, there) in differences(model, stored).items():
        if name == "pattern" and wanted.replace("W", "*") == there.replace("W", "*"):
            pass  # windows have no weights
        elif name == "vocab_size" and wanted < there:
            raise UserError(f"model.vocab_size={wanted} is less than the {there} rows of init_from={path}: set it to {there}")
        elif not any(part in name for part in MAY_CHANGE):
            raise UserError(
                f"model.{name} is {wanted}, but init_from={path} has {there}: choose the model's own settings, as in"
                f" --config-dir {path} model=..., and change only rotary embedding, windows or the vocabulary's size"
            )
        told.append(f"model.{name}={wanted} (was {there})")
    return told


def load_initial(config: TrainConfig, engine: Engine) -> list[str]:
    """Fill the engine's weights; the optimizer starts anew. Returns what was changed of the model. Collective.

    Every rank reads what it needs by itself, one tensor at a time.
    """
    told = from_rank_0(lambda: check_initial(config))
    state = engine.state()
    agreed(lambda: _fill(state["model"], config))
    engine.load_state(state)
    return told


@torch.no_grad()
def _fill(model: dict[str, Any], config: TrainConfig) -> None:
    assert config.init_from is not None
    opened = open_weights(config.init_from, checked=False)  # rank 0 has done that
    source: Source = opened.ours
    if config.model.vocab_size != opened.config.vocab_size:
        grown = opened.config.model_copy(update={"vocab_size": config.model.vocab_size})
        source = Translated(WeightMap.of(grown, None, opened.config.vocab_size), source)
    for name, tensor in model.items():
        if name in source.infos:
            _copy(tensor, source.read(name))
        elif not name.endswith("balancer.bias"):  # one that the model did not have before starts at 0, as in any run
            raise UserError(f"init_from={config.init_from} has no {name}, which the run's config asks for")


def _copy(tensor: Tensor, whole: Tensor) -> None:
    if whole.shape != tensor.shape:
        raise UserError(f"init_from has a tensor as {list(whole.shape)} that the run's config makes {list(tensor.shape)}")
    if not isinstance(tensor, DTensor):
        tensor.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(whole.shape, tensor.device_mesh, tensor.placements)
    tensor.to_local().copy_(whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))])
