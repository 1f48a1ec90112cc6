"""Generating text, token after token, with the state of every mixer (keys and values for attention) kept between tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lctrain.checkpoint.store import CheckpointStore
from lctrain.config.render import from_yaml
from lctrain.config.schema import TrainConfig
from lctrain.data.tokenizers import Tokenizer
from lctrain.devices import DTYPES
from lctrain.errors import UserError
from lctrain.initial_weights import open_weights
from lctrain.models.model import LanguageModel
from lctrain.models.moe.moe import TaskState
from lctrain.run_dir import RunDir


class Loaded(NamedTuple):
    """A model to sample from. about: what it is, for people. tokenizer: as in data.tokenizer."""

    model: LanguageModel
    tokenizer: str
    about: str


def load_model(path: str, checkpoint: str | None, device: torch.device) -> Loaded:
    """A run's model, or that of a model folder or of Hugging Face (`lctrain convert` reads both), in fp32 arithmetic."""
    if RunDir(path).config.exists() or checkpoint is not None or not Path(path).is_dir():
        config, model, step = load_run(path, checkpoint, device)
        return Loaded(model, config.data.tokenizer, f"{config.model.name} after {step} steps")
    opened = open_weights(path)
    with torch.device("meta"):
        model = LanguageModel(opened.config)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(opened.ours.read(name))
    tokenizer = None if opened.carried is None else opened.carried / "tokenizer.json"
    spec = str(tokenizer) if tokenizer is not None and tokenizer.exists() else "bytes"
    return Loaded(model.eval(), spec, opened.config.name)


def load_run(path: str, checkpoint: str | None, device: torch.device) -> tuple[TrainConfig, LanguageModel, int]:
    """The config, model and finished steps of a run's checkpoint (its newest whole one if none is named)."""
    run = RunDir(path)
    if not run.config.exists():
        raise UserError(f"run={path} is not a run directory: {run.config} does not exist")
    config = from_yaml(TrainConfig, run.config.read_text())
    store = CheckpointStore(run.checkpoints, config.checkpoint.keep_last)
    chosen = store.newest_verified() if checkpoint is None else Path(checkpoint)
    if chosen is None:
        raise UserError(f"run={path} has no checkpoint yet: let it train until it has written one")
    with torch.device("meta"):
        model = LanguageModel(config.model, DTYPES[config.engine.dtype])
    model.to_empty(device=device)
    meta = store.load(chosen, {"model": dict(model.state_dict())})
    return config, model.eval(), int(meta["step"])


def generate(
    model: LanguageModel,
    prompt: Tensor,
    tokens: int,
    eod: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    task: int = 0,
) -> Iterator[int]:
    """Token ids that continue `prompt` (int64 [n], n >= 1): at most `tokens`, and none from the end-of-document id on.

    Draws from softmax(logits / temperature), cut to the top_k likeliest and then to the smallest set of mass top_p. task: the
    gate of a task-conditioned router.
    """
    generator = torch.Generator().manual_seed(seed)
    state, newest = model.new_state(), prompt[None]
    for memory in state:
        if isinstance(memory, TaskState):
            memory.task = task
    for _ in range(tokens):
        logits = model.decode(newest, state)[0].cpu()
        token = draw(logits, temperature, top_k, top_p, generator)
        if token == eod:
            return
        yield token
        newest = torch.tensor([[token]], device=prompt.device)


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """One token id from fp32 logits [V]."""
    if temperature == 0:
        return int(logits.argmax())
    ordered, ids = ((logits - logits.max()) / temperature).softmax(dim=-1).sort(descending=True, stable=True)
    if top_k:
        ordered = ordered[:top_k]
    before = ordered.cumsum(0) - ordered  # the likeliest token always stays
    ordered = torch.where(before < top_p * ordered.sum(), ordered, 0.0)
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])


class TextStream:
    """Turns ids into text piece by piece, holding back what the next id may still change (half a UTF-8 character)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = self._shown = 0  # ids before _shown are printed; those from _context on serve as left context

    def push(self, token: int) -> str:
        """The text that is certain after this id."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back."""
        return self._new_text()

    def _new_text(self) -> str:
        known = self._tokenizer.decode(np.array(self._ids[self._context : self._shown], dtype=np.int64))
        return self._tokenizer.decode(np.array(self._ids[self._context :], dtype=np.int64))[len(known) :]
