"""Weights on our side: a model folder (written by `lctrain convert`), a run directory, or one of its checkpoints.

<folder>/model/<name>.yaml             the model's settings; `lctrain train --config-dir <folder> model=<name>` finds them
<folder>/model.safetensors             the weights under our names; several files and an index if they are large
<folder>/huggingface/                  config.json, tokenizer and generation settings as they came
<folder>/conversion.json               where it all came from
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from lctrain.checkpoint.manifest import NAME as MANIFEST
from lctrain.checkpoint.manifest import problems
from lctrain.config.model import ModelConfig
from lctrain.config.render import from_yaml, render
from lctrain.config.schema import TrainConfig
from lctrain.convert.dcp import DcpFolder
from lctrain.convert.opened import UnknownModel
from lctrain.convert.safetensors import SafetensorsFolder
from lctrain.convert.stream import Source
from lctrain.errors import UserError

CARRIED = "huggingface"
NOTE = "conversion.json"
MODEL_GROUP = "model"


class Native(NamedTuple):
    """Opened weights of ours. carried: the folder of files that came along, if any. note: what conversion.json says."""

    config: ModelConfig
    source: Source
    carried: Path | None
    note: dict[str, Any]


def is_native(path: Path) -> bool:
    """Whether a folder holds weights of ours."""
    return (path / MANIFEST).exists() or (path / "checkpoints").is_dir() or _model_file(path) is not None


def open_native(path: Path, config_file: str | None = None, checked: bool = True) -> Native:
    """Weights of ours. config_file: a YAML of model settings, where a checkpoint was taken out of its run directory.

    UserError if the path holds no whole model. checked: hash the files of a training checkpoint first.
    """
    model_file = _model_file(path)
    if model_file is not None:
        config = read_model(Path(config_file) if config_file else model_file)
        carried = path / CARRIED
        note = json.loads((path / NOTE).read_text()) if (path / NOTE).exists() else {}
        return Native(config, SafetensorsFolder(path), carried if carried.is_dir() else None, note)
    checkpoint = path if (path / MANIFEST).exists() else _newest(path)
    wrong = problems(checkpoint) if checked else []
    if wrong:
        raise UserError(f"checkpoint {checkpoint} cannot be used: {'; '.join(wrong)}")
    run_config = checkpoint.parent.parent / "config.yaml"
    if config_file:
        config = read_model(Path(config_file))
    elif run_config.exists():
        config = from_yaml(TrainConfig, run_config.read_text()).model
    else:
        raise UnknownModel(f"{checkpoint} stands in no run directory: say what model it is with config=FILE.yaml")
    return Native(config, DcpFolder(checkpoint, "model/"), None, {})


def read_model(path: Path) -> ModelConfig:
    """Model settings from a YAML file: those of a model, or of a whole run."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if re.search(r"^run_dir:", text, re.MULTILINE):
        return from_yaml(TrainConfig, text).model
    return from_yaml(ModelConfig, text)


def write_model(folder: Path, name: str, config: ModelConfig) -> None:
    """The settings, documented, where `--config-dir` looks for them."""
    (folder / MODEL_GROUP).mkdir()
    (folder / MODEL_GROUP / f"{name}.yaml").write_text(render(config))


def name_of(folder: Path) -> str:
    """A config's name made of a folder's."""
    return re.sub(r"[^a-z0-9_]+", "_", folder.name.lower()).strip("_") or "converted"


def _model_file(path: Path) -> Path | None:
    found = sorted((path / MODEL_GROUP).glob("*.yaml"))
    return found[0] if len(found) == 1 else None


def _newest(path: Path) -> Path:
    from lctrain.checkpoint.folders import checkpoints

    for _, checkpoint in reversed(checkpoints(path / "checkpoints")):
        if (checkpoint / MANIFEST).exists():
            return checkpoint
    raise UserError(f"{path} holds no weights of lctrain: name a folder that `lctrain convert` wrote, a run, or a checkpoint")
