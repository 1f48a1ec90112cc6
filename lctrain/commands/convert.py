"""Take weights from Hugging Face, Megatron or DeepSpeed, and back.

usage: lctrain convert to=<hf|lctrain|megatron|deepspeed> input=FOLDER output=FOLDER [from=...] [name=value ...]
       lctrain convert --list

  lctrain convert from=hf to=lctrain input=Llama-3.2-1B output=models/llama
  lctrain convert to=hf input=runs/long output=exported dtype=bf16
  lctrain convert to=megatron input=models/llama output=models/llama-megatron
  lctrain convert to=lctrain input=Qwen3-8B dry_run=true

Tensor by tensor, so that memory does not grow with the model. Afterwards both sides compute logits on random tokens, which
must agree. --list prints the families of models that there are tables for.
"""

from __future__ import annotations


def main(args: list[str]) -> int:
    """Run the command."""
    if "--list" in args:
        from lctrain.convert.listing import list_families

        list_families()
        return 0
    from lctrain.config.convert import ConvertConfig
    from lctrain.config.load import load

    options = load(ConvertConfig, "convert", args)
    from lctrain.convert.run import convert

    return convert(options)
