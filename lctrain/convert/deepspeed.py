"""DeepSpeed checkpoints: ZeRO 0 to 3 and universal ones are read, universal ones written, without DeepSpeed.

The fp32 weights lie in the optimizer's files: stages 1 and 2 have all parameters end to end, cut into one piece per rank;
stage 3 cuts every parameter by itself. A universal checkpoint has a folder per parameter, and any stage on any number of ranks
loads it. Their pickles go through the restricted unpickler, tensors stay on disk until they are used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lctrain.checkpoint.unpickle import load_torch
from lctrain.config.convert import ConvertConfig
from lctrain.config.model import ModelConfig
from lctrain.config.render import from_yaml, to_yaml
from lctrain.convert.archive import bytes_of, save_without_numbers, write_at
from lctrain.convert.families import family_named
from lctrain.convert.formats import Plan
from lctrain.convert.huggingface import from_theirs
from lctrain.convert.keys import NAME, read_config
from lctrain.convert.mapping import Translated, WeightMap
from lctrain.convert.native import NOTE, read_model
from lctrain.convert.opened import Opened, UnknownModel, padded
from lctrain.convert.stream import Info, Source, Target
from lctrain.errors import UserError

MODEL = "lctrain_model.yaml"
"""Our settings, beside what we write."""
VERSION = "0.19.8"
"""Of DeepSpeed, whose format is written."""
MOST_GROUPS = 64
"""Groups of parameters that an optimizer which loads what we write may have."""
TAG = "converted_universal"


class Pieces:
    """A Source of tensors that lie in pieces: name -> shape and flat pieces, end to end, perhaps with padding after them."""

    def __init__(self, tensors: Mapping[str, tuple[torch.Size, list[Tensor]]]) -> None:
        self._tensors = tensors
        self.infos = {name: Info(shape, pieces[0].dtype) for name, (shape, pieces) in tensors.items()}

    def read(self, name: str, lines: slice | None = None) -> Tensor:
        """See Source."""
        info, pieces = self.infos[name], self._tensors[name][1]
        first, last = info.span(lines)
        parts = _cut(pieces, first * info.width, (last - first) * info.width)
        return info.shaped(torch.cat(parts), lines)  # a copy: pieces are mapped files


def open_deepspeed(path: Path, options: ConvertConfig) -> Opened:
    """A checkpoint's folder, or that of all checkpoints, of which the one named by `latest` or `latest_universal` is taken."""
    folder = _tag_folder(path)
    tensors = _universal(folder) if (folder / "zero").is_dir() else _zero(folder)
    tensors = {name.removeprefix("module."): entry for name, entry in tensors.items()}
    source = Pieces(tensors)
    note = json.loads((folder / NOTE).read_text()) if (folder / NOTE).exists() else {}
    if options.config is not None and (Path(options.config).is_dir() or options.config.endswith(".json")):
        return _open_theirs(source, options)
    if options.config is not None:
        config = read_model(Path(options.config))
    elif (folder / MODEL).exists():
        config = from_yaml(ModelConfig, (folder / MODEL).read_text())
    else:
        raise UnknownModel(
            f"{folder} does not say what model it is: add config=FILE.yaml with its settings, or config=FOLDER with the"
            f" {NAME} of Hugging Face, if its tensors are named so"
        )
    mapping = WeightMap.of(padded(config, options.vocab_multiple), None, config.vocab_size)
    unmatched = mapping.check_theirs(source.infos, {})
    ours = Translated(mapping, source)
    vocabulary = int(note.get("vocab_size") or config.vocab_size)
    return Opened(padded(config, options.vocab_multiple), ours, vocabulary, mapping, unmatched, family=note.get("family"))


def _open_theirs(source: Source, options: ConvertConfig) -> Opened:
    """A model of transformers that was trained with DeepSpeed."""
    given = Path(options.config or "")
    content = read_config(given if given.is_dir() else given.parent)
    family = family_named(str(content.get("model_type")))
    config, listed = family.model_config(content, options.accept)
    carried = given if given.is_dir() else None
    return from_theirs(family, padded(config, options.vocab_multiple), config.vocab_size, source, listed, carried)


def _tag_folder(path: Path) -> Path:
    for name in ("latest_universal", "latest"):
        if (path / name).exists():
            tag = (path / name).read_text().strip()
            if Path(tag).name != tag:
                raise UserError(f"{path / name} names {tag!r}, which is no folder beside it")
            return path / tag
    return path


def _universal(folder: Path) -> dict[str, tuple[torch.Size, list[Tensor]]]:
    found = {}
    for file in sorted(folder.glob("zero/*/fp32.pt")):
        content = load_torch(file)
        tensor = content["param"] if isinstance(content, dict) else content
        if not isinstance(tensor, Tensor):
            raise UserError(f"{file} holds no parameter")
        found[file.parent.name] = (tensor.shape, [tensor])
    if not found:
        raise UserError(f"{folder} has no zero/*/fp32.pt: it is no universal checkpoint of DeepSpeed")
    states = _model_states(folder)
    if not states:
        return found
    state = load_torch(states[0])
    for name, shape in (item for shapes in state.get("param_shapes") or () for item in shapes.items()):
        if name in found and found[name][0].numel() == torch.Size(shape).numel():  # made from stage 3 they are flat
            found[name] = (torch.Size(shape), found[name][1])
    return found | _buffers(state)


def _zero(folder: Path) -> dict[str, tuple[torch.Size, list[Tensor]]]:
    states = _model_states(folder)
    if not states:
        raise UserError(f"{folder} is no checkpoint of DeepSpeed: it has neither zero/ nor *model_states.pt")
    ranks = {re.sub(r".*mp_rank_(\d+).*", r"\1", path.name) for path in states}
    if len(ranks) > 1 or list(folder.glob("layer_*")):
        raise UserError(
            f"{folder} was written by tensor- or pipeline-parallel ranks: make it universal first (python -m"
            f" deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder {folder}_universal) and convert"
            f" {folder}_universal"
        )
    state = load_torch(states[0])
    optimizers = sorted(folder.glob("*zero_pp_rank_*_mp_rank_*_optim_states.pt"), key=_rank_of)
    if not optimizers:  # stage 0: the model's file has everything
        module = state["module"]
        return {name: (x.shape, [x]) for name, x in module.items() if isinstance(x, Tensor)}
    parts = [load_torch(path)["optimizer_state_dict"] for path in optimizers]
    count = parts[0]["partition_count"]
    count = max(count) if isinstance(count, list) else count
    if count != len(parts):
        raise UserError(f"{folder} is not whole: it has {len(parts)} of {count} optimizer files")
    found = _stage_3(state, parts) if int(_plain(parts[0]["zero_stage"])) == 3 else _stages_1_2(state, parts)
    found |= _frozen(state)
    for alias, name in (state.get("shared_params") or {}).items():
        found.setdefault(alias, found[name])
    return found | _buffers(state)


def _stages_1_2(state: Mapping[str, Any], parts: list[Any]) -> dict[str, tuple[torch.Size, list[Tensor]]]:
    found = {}
    paddings = parts[0].get("param_alignment_paddings")
    for group, shapes in enumerate(state["param_shapes"]):
        pieces = [part["single_partition_of_fp32_groups"][group] for part in parts]
        after = paddings[group] if paddings is not None else [0] * len(shapes)
        at = 0
        for (name, shape), gap in zip(shapes.items(), after, strict=True):
            shape = torch.Size(shape)
            found[name] = (shape, _cut(pieces, at, shape.numel()))
            at += shape.numel() + gap
    return found


def _stage_3(state: Mapping[str, Any], parts: list[Any]) -> dict[str, tuple[torch.Size, list[Tensor]]]:
    found = {}
    flat = [part["fp32_flat_groups"] for part in parts]
    flat = [groups if isinstance(groups, list) else [groups] for groups in flat]
    at = 0
    for name, shape in (item for shapes in state["param_shapes"] for item in shapes.items()):
        shape = torch.Size(shape)
        each = math.ceil(shape.numel() / len(parts))
        found[name] = (shape, [piece for groups in flat for piece in _cut(groups, at, each)])
        at += each
    return found


def _cut(pieces: Iterable[Tensor], start: int, count: int) -> list[Tensor]:
    """Numbers start .. start + count - 1 of flat pieces that lie end to end."""
    found = []
    for piece in pieces:
        low, high = max(start, 0), min(start + count, piece.numel())
        if low < high:
            found.append(piece.reshape(-1)[low:high])
        start -= piece.numel()
    if sum(piece.numel() for piece in found) != count:
        raise UserError("the checkpoint is not whole: its optimizer files have fewer numbers than its parameters")
    return found or [torch.empty(0)]


def _frozen(state: Mapping[str, Any]) -> dict[str, tuple[torch.Size, list[Tensor]]]:
    shapes, pieces = state.get("frozen_param_shapes"), state.get("frozen_param_fragments")
    if not shapes:
        return {}
    if not pieces or any(pieces[name].numel() != torch.Size(shape).numel() for name, shape in shapes.items()):
        raise UserError(f"the checkpoint has frozen parameters in pieces ({next(iter(shapes))}): make it universal first")
    return {name: (torch.Size(shape), [pieces[name]]) for name, shape in shapes.items()}


def _buffers(state: Mapping[str, Any]) -> dict[str, tuple[torch.Size, list[Tensor]]]:
    names = set(state.get("buffer_names") or ())
    return {name: (x.shape, [x]) for name, x in (state.get("module") or {}).items() if name in names}


def _model_states(folder: Path) -> list[Path]:
    return sorted(folder.glob("mp_rank_*_model_states.pt")) or sorted(folder.glob("zero_pp_rank_0_mp_rank_*_model_states.pt"))


def _rank_of(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    assert match is not None
    return int(match[1])


def _plain(value: Any) -> Any:
    """The number of an enum of DeepSpeed's, which is read as a record."""
    arguments = getattr(value, "arguments", None)
    return arguments[0] if arguments else value


class UniversalWriter:
    """A Target: zero/<name>/fp32.pt and AdamW's moments, which are zeros that take no room."""

    def __init__(self, folder: Path, infos: Mapping[str, Info], axes: Mapping[str, int], buffers: set[str]) -> None:
        self._folder, self._infos, self._axes, self._names = folder, infos, axes, buffers
        self._buffers: dict[str, Tensor] = {}

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """See Target."""
        shape = self._infos[name].shape
        if name in self._names:
            self._buffers[name] = torch.cat(list(blocks)).reshape(shape)
            return
        place = self._folder / TAG / "zero" / name
        place.mkdir(parents=True)
        with open(place / "fp32.pt", "x+b", buffering=0) as file:
            at = save_without_numbers({"param": torch.empty(shape), "cat_dim": self._axes.get(name, 0)}, file)
            for block in blocks:
                data = bytes_of(block)
                write_at(file.fileno(), data, at)
                at += len(data)
        zeros = torch.zeros(1).expand(shape.numel())
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.save({"param": zeros}, place / f"{moment}.pt")
        torch.save(torch.tensor(0.0), place / "step.pt")

    def close(self) -> None:
        """See Target."""
        shapes = {name: info.shape for name, info in self._infos.items() if name not in self._names}
        state = {
            "module": self._buffers,
            "buffer_names": sorted(self._names),
            "param_shapes": [shapes],
            "shared_params": {},
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "global_steps": 0,
            "global_samples": 0,
            "skipped_steps": 0,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "ds_config": {},
            "ds_version": VERSION,
        }
        folder = self._folder / TAG
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):  # stages 0 to 2, and 3
            torch.save(state, folder / name)
        # Groups of an optimizer are loaded for which there is one here; settings that it does not have stay as they are.
        groups: list[dict[str, Any]] = [{"params": []} for _ in range(MOST_GROUPS)]
        optimizer = {"state": {0: {"step": torch.tensor(0.0)}}, "param_groups": groups}
        content = {"ds_version": VERSION, "param_groups": groups, "optimizer_state_dict": optimizer}
        torch.save(content, folder / "zero" / "optimizer_state.pt")


def plan_deepspeed(options: ConvertConfig, opened: Opened) -> Plan:
    """See Plan. Tensors are named as in our model."""
    from lctrain.models.model import LanguageModel

    if options.dtype not in ("keep", "fp32"):
        raise UserError(f"dtype={options.dtype}: universal checkpoints of DeepSpeed hold fp32 weights; leave dtype out")
    config = opened.config
    mapping = WeightMap.of(config, None)
    with torch.device("meta"):
        model = LanguageModel(config)
    buffers = {name for name, _ in model.named_buffers()}
    rows = {name for name in mapping.ours if name.endswith(("mixer.out.weight", "mixer.down.weight", "shared.down.weight"))}

    def begin(folder: Path, infos: Mapping[str, Info]) -> Target:
        return UniversalWriter(folder, infos, dict.fromkeys(rows, 1), buffers)

    def finish(folder: Path, infos: Mapping[str, Info]) -> None:
        (folder / NOTE).rename(folder / TAG / NOTE)
        (folder / TAG / MODEL).write_text(to_yaml(config))
        (folder / "latest_universal").write_text(TAG)

    says = "a universal checkpoint (our names, fp32, moments zero)"
    return Plan(mapping, begin, finish, says, dtype=torch.float32)
