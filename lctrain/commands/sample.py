"""Generate text from a trained model.

usage: lctrain sample run=DIR [prompt=TEXT] [name=value ...]

  lctrain sample run=runs/demo prompt="def main("
  lctrain sample run=runs/demo tokens=500 temperature=0.6 samples=3
"""

from __future__ import annotations

from lctrain.config.load import load
from lctrain.config.sample import SampleConfig


def main(args: list[str]) -> int:
    """Run the command."""
    config = load(SampleConfig, "sample", args)

    import numpy as np
    import torch

    from lctrain.data.tokenizers import load_tokenizer
    from lctrain.devices import choose_device
    from lctrain.errors import UserError
    from lctrain.sample import TextStream, generate, load_model

    device = choose_device(config.device)
    model, spec, about = load_model(config.run, config.checkpoint, device)
    tasks = model.config.moe.router.tasks if "E" in model.config.pattern else 1
    if config.task >= tasks:
        has = (
            f"has gates for tasks 0 to {tasks - 1}"
            if tasks > 1
            else "has no gates for tasks (model.moe.router.tasks=1); leave it out"
        )
        raise UserError(f"task={config.task}: the model of {config.run} {has}")
    tokenizer = load_tokenizer(spec)
    ids = tokenizer.encode(config.prompt).astype(np.int64).tolist()
    prompt = torch.tensor(ids or [tokenizer.eod], device=device)  # after a document's end comes a new document
    print(f"--- {about}", flush=True)
    for number in range(config.samples):
        stream = TextStream(tokenizer)
        print(config.prompt, end="", flush=True)
        settings = (config.temperature, config.top_k, config.top_p, config.seed + number, config.task)
        for token in generate(model, prompt, config.tokens, tokenizer.eod, *settings):
            print(stream.push(token), end="", flush=True)
        print(stream.finish(), "\n---", sep="", flush=True)
    return 0
