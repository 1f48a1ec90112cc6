"""Measure speed, memory and traffic, side by side with what others would use.

usage: lctrain bench {step,attention} [name=value ...]

  lctrain bench step model=small seq=1024,4096
  lctrain bench attention strategies=ring,all_gather cp=2,4 seq=8192,16384
"""

from __future__ import annotations

from lctrain.subcommands import subcommands


def main(args: list[str]) -> int:
    """Run the command."""
    return subcommands("bench", {"step": _step, "attention": _attention}, args)


def _step(args: list[str]) -> int:
    """Time whole optimizer steps beside transformers' Llama with the same weights, on one process each.

    usage: lctrain bench step [model=small] [seq=1024,4096] [name=value ...]

      lctrain bench step model=small output=step.json
      lctrain bench step model=tiny seq=8192 documents=12 dtype=bf16
    """
    from lctrain.config.bench import StepBenchConfig
    from lctrain.config.load import load

    config = load(StepBenchConfig, "bench_step", args)
    from lctrain.bench.step import bench_step

    return bench_step(config)


def _attention(args: list[str]) -> int:
    """Time sequence-parallel attention beside one process with SDPA; count its bytes, check its results.

    usage: lctrain bench attention [strategies=ring,all_gather] [cp=2,4] [seq=8192] [name=value ...]

      lctrain bench attention cp=2,4 seq=8192,16384
      lctrain bench attention kv_heads=2 dtype=bf16 documents=3000,100,5092
    """
    from lctrain.config.bench import AttentionBenchConfig
    from lctrain.config.load import load

    config = load(AttentionBenchConfig, "bench_attention", args)
    from lctrain.bench.attention import bench_attention

    return bench_attention(config)
