"""Prove that sequence-parallel attention computes what one process does, and that every block computes what it should.

usage: lctrain verify attention|blocks [name=value ...]

  lctrain verify blocks
  lctrain verify attention
  lctrain verify attention quick=true
  lctrain verify attention strategies=token_ring cp=4 lengths=1000 output=report.json
"""

from __future__ import annotations

from lctrain.subcommands import subcommands


def main(args: list[str]) -> int:
    """Run the command."""
    return subcommands("verify", {"attention": _attention, "blocks": _blocks}, args)


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
