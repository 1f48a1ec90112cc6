"""megatron-core distributed checkpoints (`torch_dist`), read and written without megatron-core and without its layout.

Such a folder is one of torch.distributed.checkpoint whose tensors are whole, so it does not matter on how many tensor-,
pipeline- or expert-parallel ranks it was written or will be read. Layers that are alike are stacked into one tensor
[layers, ...].
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lctrain.config.convert import ConvertConfig
from lctrain.config.model import ModelConfig
from lctrain.config.render import from_yaml, to_yaml
from lctrain.convert import megatron_names as names
from lctrain.convert.dcp import DcpFolder
from lctrain.convert.dcp_writer import DcpWriter, Slot
from lctrain.convert.formats import Plan
from lctrain.convert.mapping import Translated, WeightMap
from lctrain.convert.native import NOTE, read_model
from lctrain.convert.opened import Opened, UnknownModel, padded
from lctrain.convert.stream import Info, Target
from lctrain.errors import UserError

MODEL = "lctrain_model.yaml"
"""Our settings, beside what we write."""
SETTINGS = "transformer_config.json"
"""What to build megatron-core's model with."""
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_STACKED = re.compile(r"decoder\.layers\.(?!\d+\.)(.*)")


class MegatronFolder:
    """A Source of their tensors by layer, `decoder.layers.3.mlp.linear_fc2.weight`, stacked in the files or not."""

    def __init__(self, folder: Path) -> None:
        self._files = DcpFolder(folder)
        self._rows: dict[str, tuple[str, int]] = {}
        self.infos: dict[str, Info] = {}
        for key, info in self._files.infos.items():
            stacked = _STACKED.fullmatch(key)
            if stacked is None:
                self.infos[key] = info
                continue
            for layer in range(info.shape[0]):
                name = f"decoder.layers.{layer}.{stacked[1]}"
                self.infos[name], self._rows[name] = Info(info.shape[1:], info.dtype), (key, layer)
        for name in list(self.infos):
            self._rename(name)

    def read(self, name: str, lines: slice | None = None) -> Tensor:
        """See Source."""
        info, place = self.infos[name], self._rows.get(name, name)
        if isinstance(place, str):
            return self._files.read(place, lines)
        key, layer = place
        first, last = info.span(lines)
        if len(info.shape) > 1:
            return info.shaped(self._files.read(key, slice(layer * info.lines + first, layer * info.lines + last)), lines)
        return info.shaped(self._files.read(key, slice(layer, layer + 1)).reshape(-1)[first:last], lines)

    def _rename(self, name: str) -> None:
        """Norms go by the names of modules of their own here; a copy under the other name is forgotten."""
        for alone, fused in names.ALIASES.items():
            if not name.endswith(f".{fused}"):
                continue
            wanted = f"{name.removesuffix(fused)}{alone}"
            info, place = self.infos.pop(name), self._rows.pop(name, name)
            if wanted not in self.infos:
                self.infos[wanted] = info
                self._rows[wanted] = place  # type: ignore[assignment]
            return


def open_megatron(path: Path, options: ConvertConfig) -> Opened:
    """A distributed checkpoint, or the folder of Megatron-LM's iterations, of which the latest is taken."""
    latest = path / "latest_checkpointed_iteration.txt"
    if latest.exists():
        path = path / f"iter_{int(latest.read_text()):07d}"
    if not (path / ".metadata").exists():
        raise UserError(f"{path} is no distributed checkpoint of megatron-core (torch_dist): it has no .metadata")
    if options.config is not None:
        config = read_model(Path(options.config))
    elif (path / MODEL).exists():
        config = from_yaml(ModelConfig, (path / MODEL).read_text())
    else:
        raise UnknownModel(f"{path} does not say what model it is: add config=FILE.yaml with its settings")
    source = MegatronFolder(path)
    note = json.loads((path / NOTE).read_text()) if (path / NOTE).exists() else {}
    stored = source.infos.get("embedding.word_embeddings.weight")
    rows = stored.shape[0] if stored is not None else config.vocab_size
    vocabulary = min(rows, config.vocab_size)
    config = config.model_copy(update={"vocab_size": rows})  # megatron pads it by itself
    mapping = WeightMap.of(padded(config, options.vocab_multiple), names.rules(config, options.accept), rows)
    dropped = {name: "optimizer state" for name in source.infos if name.startswith(("optimizer.", "chained_"))}
    unmatched = mapping.check_theirs(source.infos, dropped)
    ours = Translated(mapping, source)
    real = int(note.get("vocab_size") or vocabulary)
    return Opened(padded(config, options.vocab_multiple), ours, real, mapping, unmatched, dropped, family=note.get("family"))


def plan_megatron(options: ConvertConfig, opened: Opened) -> Plan:
    """See Plan."""
    config = opened.config
    mapping = WeightMap.of(config, names.rules(config, options.accept))
    settings = names.settings(config)
    layers = settings["transformer_config"]["num_layers"]
    stacked = names.is_uniform(config)

    def begin(folder: Path, infos: Mapping[str, Info]) -> Target:
        slots = {name: _slots(name, layers if stacked else None) for name in infos}
        return DcpWriter(folder, infos, slots, _extra_states(infos, layers if stacked else None), int(options.shard_gb * 1e9))

    def finish(folder: Path, infos: Mapping[str, Info]) -> None:
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        (folder / MODEL).write_text(to_yaml(config))
        torch.save({}, folder / "common.pt")
        (folder / "metadata.json").write_text(json.dumps(FORMAT))

    return Plan(mapping, begin, finish, f"megatron-core {settings['class']}, any tp, pp and ep")


def _slots(name: str, layers: int | None) -> list[Slot]:
    """Under all its names; stacked if `layers` says so."""
    found = [name]
    for alone, fused in names.ALIASES.items():
        match = re.fullmatch(rf"(decoder\.layers\.\d+\.){re.escape(alone)}", name)
        if match:
            found.append(f"{match[1]}{fused}")
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layers is None or match is None:
        return [Slot(each) for each in found]
    return [Slot(each.replace(match[0], "decoder.layers."), int(match[1]), layers) for each in found]


def _extra_states(infos: Mapping[str, Info], layers: int | None) -> list[str]:
    """Keys of the empty `_extra_state` that modules ask for when they are loaded; those of others are ignored.

    layers: how many are stacked, if they are.
    """
    keys = dict.fromkeys(f"{module}._extra_state/shard_0_1" for module in names.WHOLE_MODULES)
    for name, info in infos.items():
        match = re.match(r"decoder\.layers\.(\d+)\.", name)
        if match is None:
            continue
        stem, at, of = (match[0], "", "") if layers is None else ("decoder.layers.", f"{match[1]}.", f"{layers}.")
        for module in names.MODULES:
            keys[f"{stem}{module}._extra_state/shard_{at[:-1] or 0}_{of[:-1] or 1}"] = None
        if ".experts.experts.linear_fc1." in name:
            for expert in range(info.shape[0]):
                for linear in ("linear_fc1", "linear_fc2"):
                    place = f"shard_{at}{expert}_{of}{info.shape[0]}"
                    keys[f"{stem}mlp.experts.experts.{linear}._extra_state/{place}"] = None
    return list(keys)
