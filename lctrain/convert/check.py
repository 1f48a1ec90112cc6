"""`verify=true`: whether the output, read again from its files, computes what the input does."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lctrain.config.convert import ConvertConfig
from lctrain.console import say, warn
from lctrain.convert.formats import open_input
from lctrain.convert.function import symbols
from lctrain.convert.huggingface import hf_logits
from lctrain.convert.opened import Opened
from lctrain.convert.verify import compare, our_logits, random_tokens
from lctrain.errors import UserError

ROOM = 1.3
"""Memory that a model needs for its logits, of the size of its fp32 weights."""


def verify(options: ConvertConfig, kind: str, opened: Opened, folder: Path, rounded: bool) -> None:
    """Compare logits, one side after the other; UserError if they differ. Skipped, with a warning, where memory is short."""
    import psutil

    needed = int(ROOM * 4 * sum(info.shape.numel() for info in opened.ours.infos.values()))
    available = psutil.virtual_memory().available
    if needed > available:
        warn(f"not verified: logits need {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free")
        return
    tokens = random_tokens(options.verify_tokens, min(opened.vocabulary, options.vocab_size or opened.vocabulary))
    wanted = _logits(options, kind, opened, tokens)
    again = options.model_copy(
        update={"from": options.to, "input": str(folder), "vocab_multiple": 1, "dtype": "keep", "output": None}
    )
    found = _logits(again, options.to, open_input(again)[1], tokens)
    experts = "E" in symbols(opened.config.pattern)
    result = compare(found, wanted, rounded, experts)
    told = f"largest error {result.worst:.1e} of the largest logit on {len(tokens)} random tokens, fp32"
    if experts and result.beyond:
        told += f"; {result.beyond:.0%} of the tokens beyond {result.bar:.0e} (sent to other experts)"
    if not result.passed:
        raise UserError(f"verification failed: {told} (allowed {result.bar:.0e}); nothing was written")
    say(f"verified: {told}")


def _logits(options: ConvertConfig, kind: str, opened: Opened, tokens: Tensor) -> Tensor:
    """transformers' where the format is its own; else our model's, with the weights as they are read back."""
    if kind == "hf":
        return hf_logits(Path(options.input), tokens)
    return our_logits(opened.config, opened.ours, tokens)
