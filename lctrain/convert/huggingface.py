"""Hugging Face model folders: opened as a model of ours, and written from one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lctrain.checkpoint.unpickle import load_torch
from lctrain.config.model import ModelConfig
from lctrain.convert.families import family_for, family_named
from lctrain.convert.family import Family
from lctrain.convert.function import differences
from lctrain.convert.keys import HARMLESS, NAME, read_config
from lctrain.convert.mapping import Translated, WeightMap
from lctrain.convert.opened import Opened, padded
from lctrain.convert.safetensors import SafetensorsFolder
from lctrain.convert.stream import Info, Source
from lctrain.errors import UserError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_MOST_CARRIED_BYTES = 500_000_000
UNKNOWN_CONTEXT = 8192
"""max_position_embeddings of a model of which neither its rope settings nor an earlier config.json tell it."""
_TORCH_INDEX = "pytorch_model.bin.index.json"


class TorchFiles:
    """pytorch_model*.bin, the pickled format of before safetensors, through the restricted unpickler; a Source."""

    def __init__(self, folder: Path) -> None:
        index = folder / _TORCH_INDEX
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["pytorch_model.bin"]
        self._tensors: dict[str, Tensor] = {}
        for name in names:
            content = load_torch(folder / Path(name).name)
            if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
                raise UserError(f"{folder / name} does not hold tensors by name")
            self._tensors.update(content)
        self.infos = {name: Info(x.shape, x.dtype) for name, x in self._tensors.items()}

    def read(self, name: str, lines: slice | None = None) -> Tensor:
        """See Source."""
        info, whole = self.infos[name], self._tensors[name].detach()
        first, last = info.span(lines)
        return info.shaped(whole.reshape(info.lines, info.width)[first:last].clone(), lines)


def open_hf(path: Path, accept: Sequence[str] = (), vocab_multiple: int = 1) -> Opened:
    """A model folder of Hugging Face; UserError that names what of it we lack."""
    content = read_config(path)
    family = family_named(str(content.get("model_type")))
    config, listed = family.model_config(content, accept)
    vocabulary, config = config.vocab_size, padded(config, vocab_multiple)
    theirs: Source = (
        TorchFiles(path) if not list(path.glob("*.safetensors")) and _has_torch_files(path) else SafetensorsFolder(path)
    )
    return from_theirs(family, config, vocabulary, theirs, listed, path)


def from_theirs(
    family: Family, config: ModelConfig, vocabulary: int, theirs: Source, listed: list[str], carried: Path | None
) -> Opened:
    """A model of ours whose weights come from tensors named as in transformers."""
    mapping = WeightMap.of(config, family.rules(config), vocabulary)
    dropped = dict(family.dropped(config))
    if config.tie_embeddings:
        dropped["lm_head.weight"] = "tied to the embedding"
    dropped |= {name: "computed from the config" for name in theirs.infos if name.endswith("rotary_emb.inv_freq")}
    unmatched = mapping.check_theirs(theirs.infos, dropped)
    present = {name: why for name in theirs.infos for prefix, why in dropped.items() if name.startswith(prefix)}
    return Opened(config, Translated(mapping, theirs), vocabulary, mapping, unmatched, present, listed, carried, family.name)


def hf_target(config: ModelConfig, family_name: str | None, vocabulary: int) -> tuple[Family, dict[str, Any], WeightMap]:
    """The family to write (by default the first that can express it), its config.json, and the map to its tensors."""
    config = config.model_copy(update={"vocab_size": vocabulary})
    family = family_named(family_name) if family_name else family_for(config)
    return family, family.hf_config(config), WeightMap.of(config, family.rules(config), vocabulary)


def finish_config(
    family: Family, config: ModelConfig, content: Mapping[str, Any], carried: Path | None, infos: Mapping[str, Info]
) -> dict[str, Any]:
    """config.json with what came along and changes no result: names, ids, first values."""
    old: dict[str, Any] = {}
    if carried is not None and (carried / NAME).exists():
        old = read_config(carried)
    kept = {key: value for key, value in old.items() if key in HARMLESS or (key in family.harmless and key not in content)}
    kept.pop("torch_dtype", None)
    dtypes = Counter({info.dtype: 0 for info in infos.values()})
    for info in infos.values():
        dtypes[info.dtype] += info.shape.numel()
    whole = {**kept, **content, "dtype": str(dtypes.most_common(1)[0][0]).removeprefix("torch.")}
    if whole.get("max_position_embeddings") is None or _rope_changed(family, config, old):
        rope = whole.get("rope_parameters", {})
        stretched = int(rope.get("original_max_position_embeddings", 0) * rope.get("factor", 1))
        whole["max_position_embeddings"] = max(stretched, whole.get("max_position_embeddings") or 0) or UNKNOWN_CONTEXT
    again, _ = family.model_config(whole)
    assert not differences(config, again), differences(config, again)
    return whole


def _rope_changed(family: Family, config: ModelConfig, old: Mapping[str, Any]) -> bool:
    try:
        before, _ = family.model_config(old, tuple(old))
    except UserError:
        return True
    return any(".rope." in name for name in differences(config, before))


def carried_files(folder: Path) -> list[Path]:
    """What of a model folder goes along as it is: tokenizer, generation settings, licence; neither weights nor code."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith((*_WEIGHTS, ".py"))
        and path.stat().st_size <= _MOST_CARRIED_BYTES
    )


def _has_torch_files(path: Path) -> bool:
    return (path / "pytorch_model.bin").exists() or (path / _TORCH_INDEX).exists()


def hf_logits(folder: Path, tokens: Tensor) -> Tensor:
    """transformers' logits in fp32, [T, V], for int64 tokens [T]. UserError if it is not installed."""
    try:
        from transformers.models.auto.modeling_auto import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise UserError("verify=true needs transformers: pip install 'lctrain[hf]', or verify=false") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(tokens[None], use_cache=False).logits[0].float()
