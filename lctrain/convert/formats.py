"""The formats: how each is recognised and opened, and what is written of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lctrain.config.convert import ConvertConfig
from lctrain.config.model import ModelConfig
from lctrain.convert.huggingface import finish_config, hf_target, open_hf
from lctrain.convert.keys import NAME
from lctrain.convert.mapping import Translated, WeightMap
from lctrain.convert.native import CARRIED, is_native, name_of, open_native, write_model
from lctrain.convert.opened import Opened, padded
from lctrain.convert.safetensors import SafetensorsWriter
from lctrain.convert.stream import Info, Target
from lctrain.errors import UserError


class Plan(NamedTuple):
    """What will be written.

    mapping: from ours to theirs. begin: opens the target in a folder, given theirs' shapes and dtypes. finish: writes the small
    files, last of all the one without which the folder is no model. says: one line about it. dtype: what the format stores
    everything in, if it has no choice.
    """

    mapping: WeightMap
    begin: Callable[[Path, Mapping[str, Info]], Target]
    finish: Callable[[Path, Mapping[str, Info]], None]
    says: str
    carries: str = ""
    dtype: torch.dtype | None = None


def detect(path: Path) -> str:
    """The format of a folder; UserError if it is none that is known."""
    if not path.is_dir():
        raise UserError(f"input={path} is not a folder")
    if is_native(path):
        return "lctrain"
    if (path / NAME).exists():
        return "hf"
    if (path / "metadata.json").exists() and (path / ".metadata").exists():
        return "megatron"
    if any((path / name).exists() for name in ("latest", "latest_universal", "zero")) or list(path.glob("*model_states.pt")):
        return "deepspeed"
    raise UserError(f"input={path}: none of the formats that are known; say which with from=hf, lctrain, megatron or deepspeed")


def open_input(options: ConvertConfig) -> tuple[str, Opened]:
    """The input as a model of ours, and its format."""
    path = Path(options.input)
    kind = getattr(options, "from")
    kind = detect(path) if kind == "auto" else kind
    if not path.is_dir():
        raise UserError(f"input={path} is not a folder")
    if kind == "hf":
        return kind, open_hf(path, options.accept, options.vocab_multiple)
    if kind == "lctrain":
        return kind, open_ours(path, options)
    if kind == "megatron":
        from lctrain.convert.megatron import open_megatron

        return kind, open_megatron(path, options)
    from lctrain.convert.deepspeed import open_deepspeed

    return kind, open_deepspeed(path, options)


def open_ours(path: Path, options: ConvertConfig, checked: bool = True) -> Opened:
    """Weights of ours, with the vocabulary that they had before padding. checked: see open_native."""
    native = open_native(path, options.config, checked)
    config = padded(native.config, options.vocab_multiple)
    mapping = WeightMap.of(config, None, native.config.vocab_size)
    unmatched = mapping.check_theirs(native.source.infos, {})
    vocabulary = int(native.note.get("vocab_size") or native.config.vocab_size)
    ours = native.source if config.vocab_size == native.config.vocab_size else Translated(mapping, native.source)
    return Opened(config, ours, vocabulary, None, unmatched, carried=native.carried, family=native.note.get("family"))


def plan_output(options: ConvertConfig, opened: Opened) -> Plan:
    """What options.to asks for; UserError if the format cannot express the model."""
    if options.to == "hf":
        return _plan_hf(options, opened)
    if options.to == "lctrain":
        return _plan_lctrain(options, opened)
    if options.to == "megatron":
        from lctrain.convert.megatron import plan_megatron

        return plan_megatron(options, opened)
    from lctrain.convert.deepspeed import plan_deepspeed

    return plan_deepspeed(options, opened)


def note_of(opened: Opened, config: ModelConfig, source: str) -> dict[str, Any]:
    """What conversion.json says."""
    from lctrain import __version__

    return {
        "from": source,
        "family": opened.family,
        "vocab_size": opened.vocabulary,
        "lctrain": __version__,
        "name": config.name,
    }


def _plan_hf(options: ConvertConfig, opened: Opened) -> Plan:
    vocabulary = options.vocab_size or opened.vocabulary
    if vocabulary > opened.config.vocab_size:
        raise UserError(f"vocab_size={vocabulary} is more than the {opened.config.vocab_size} rows that the model has")
    family, content, mapping = hf_target(opened.config, options.family or opened.family, vocabulary)
    config = opened.config.model_copy(update={"vocab_size": vocabulary})

    def finish(folder: Path, infos: Mapping[str, Info]) -> None:
        whole = finish_config(family, config, content, opened.carried, infos)
        (folder / NAME).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")

    def begin(folder: Path, infos: Mapping[str, Info]) -> Target:
        return SafetensorsWriter(folder, infos, _shard_bytes(options), {})

    return Plan(mapping, begin, finish, f"{family.architecture} ({family.name})")


def _plan_lctrain(options: ConvertConfig, opened: Opened) -> Plan:
    mapping = WeightMap.of(opened.config, None)
    name = name_of(Path(options.output or "converted"))
    config = opened.config.model_copy(update={"name": name})

    def begin(folder: Path, infos: Mapping[str, Info]) -> Target:
        return SafetensorsWriter(folder, infos, _shard_bytes(options), {"model": name})

    return Plan(
        mapping, begin, lambda folder, infos: write_model(folder, name, config), f"model folder, settings {name}", CARRIED
    )


def _shard_bytes(options: ConvertConfig) -> int:
    return int(options.shard_gb * 1e9)
