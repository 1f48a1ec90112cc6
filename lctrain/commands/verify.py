"""Prove that layouts and sequence-parallel attention compute what one process does, and that every block is what it should be.

usage: lctrain verify layout|attention|blocks [name=value ...]

  lctrain verify layout model=llama3_8b parallel.dp=4 parallel.cp=8 parallel.attention=usp
  lctrain verify blocks
  lctrain verify attention
  lctrain verify attention quick=true
  lctrain verify attention strategies=token_ring cp=4 lengths=1000 output=report.json
"""

from __future__ import annotations

from lctrain.subcommands import subcommands


def main(args: list[str]) -> int:
    """Run the command."""
    return subcommands("verify", {"layout": _layout, "attention": _attention, "blocks": _blocks}, args)


def _layout(args: list[str]) -> int:
    """Run your config, made small, as its layout and as one process on this machine, and compare all that they compute.

    usage: lctrain verify layout [override of lctrain train ...] [verify.length=203] [verify.output=FILE] [--all]

    Loss, gradient norm, every gradient, weights after some optimizer steps, a leak probe between packed documents, and
    checkpoints. The pattern of blocks, the grid of processes and all options stay as they are; widths, depth and length shrink.
    Without a layout (one process) the model is proved on a grid of context- and expert-parallel layouts; --all proves
    the standard matrix. Exit status 1 if anything differs. Beside the settings below it takes all of `lctrain train`.

      lctrain verify layout model=llama3_8b parallel.dp=4 parallel.cp=8 parallel.attention=usp
      lctrain verify layout model=hybrid_tiny
      lctrain verify layout --all verify.only=fsdp
    """
    from lctrain.config.load import load
    from lctrain.config.verify import LayoutVerifyRoot

    mine = [arg for arg in args if arg.startswith("verify.") or arg in ("-h", "--help")]
    if "--all" in args:
        mine.append("verify.all=true")
    options = load(LayoutVerifyRoot, "verify_layout", mine).verify
    from lctrain.verify.layout.prove import verify_layout

    return verify_layout([arg for arg in args if not arg.startswith("verify.") and arg != "--all"], options)


def _attention(args: list[str]) -> int:
    """Run every strategy on local processes, with every mask, and compare results, gradients and bytes.

    usage: lctrain verify attention [quick=true] [strategies=ring,usp] [cp=2,4] [name=value ...]

    Exit status 1 if any case fails. A failure comes with the command that repeats it alone.

      lctrain verify attention
      lctrain verify attention quick=true
      lctrain verify attention strategies=usp-2-ring-outer cp=4 masks=documents heads=gqa dtypes=fp32
    """
    from lctrain.config.load import load
    from lctrain.config.verify import AttentionVerifyConfig

    config = load(AttentionVerifyConfig, "verify_attention", args)
    from lctrain.verify.attention import verify_attention

    return verify_attention(config)


def _blocks(args: list[str]) -> int:
    """Compare every block on one process with its formula, its own documents run alone, and transformers' modules.

    usage: lctrain verify blocks [quick=true] [blocks=attention,mlp] [cases=1,2] [name=value ...]

    Outputs and all gradients in fp32. Exit status 1 if any case fails; a failure comes with the command that repeats it.

      lctrain verify blocks
      lctrain verify blocks blocks=latent_attention output=report.json
    """
    from lctrain.config.load import load
    from lctrain.config.verify import BlocksVerifyConfig

    config = load(BlocksVerifyConfig, "verify_blocks", args)
    from lctrain.verify.blocks import verify_blocks

    return verify_blocks(config)
