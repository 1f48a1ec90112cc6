"""Prove that sequence-parallel attention computes what one process computes.

usage: lctrain verify attention [name=value ...]

  lctrain verify attention
  lctrain verify attention quick=true
  lctrain verify attention strategies=token_ring cp=4 lengths=1000 output=report.json
"""

from __future__ import annotations

from lctrain.subcommands import subcommands


def main(args: list[str]) -> int:
    """Run the command."""
    return subcommands("verify", {"attention": _attention}, args)


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
