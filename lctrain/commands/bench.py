"""Measure speed, memory and traffic, side by side with what others would use.

usage: lctrain bench {step,attention,simulate,plan,ssd,moe,convert,checkpoint} [name=value ...]

  lctrain bench step model=small seq=1024,4096
  lctrain bench attention strategies=ring,all_gather cp=2,4 seq=8192,16384
  lctrain bench attention --peers
  lctrain bench simulate cp=2,4 seq=4096,8192
  lctrain bench plan
  lctrain bench ssd seq=8192,16384
  lctrain bench moe experts=8,64
  lctrain bench checkpoint mb=1000
  lctrain bench convert gb=3
"""

from __future__ import annotations

from lctrain.subcommands import subcommands


def main(args: list[str]) -> int:
    """Run the command."""
    known = {
        "step": _step,
        "attention": _attention,
        "simulate": _simulate,
        "plan": _plan,
        "ssd": _ssd,
        "moe": _moe,
        "checkpoint": _checkpoint,
        "convert": _convert,
    }
    return subcommands("bench", known, args)


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

    usage: lctrain bench attention [--peers] [strategies=ring,all_gather] [cp=2,4] [seq=8192] [name=value ...]

    With --peers, other libraries' sequence-parallel attention takes part: those that run on CPU and are installed.

      lctrain bench attention cp=2,4 seq=8192,16384
      lctrain bench attention kv_heads=2 dtype=bf16 documents=3000,100,5092
      lctrain bench attention --peers
      lctrain bench attention --peers peers=zigzag_ring,llama3 dtypes=bf16
    """
    from lctrain.config.bench import AttentionBenchConfig, PeersBenchConfig
    from lctrain.config.load import load

    if "--peers" in args:
        peers_config = load(PeersBenchConfig, "bench_attention_peers", [arg for arg in args if arg != "--peers"])
        from lctrain.bench.peers.compare import bench_peers

        return bench_peers(peers_config)
    config = load(AttentionBenchConfig, "bench_attention", args)
    from lctrain.bench.attention import bench_attention

    return bench_attention(config)


def _simulate(args: list[str]) -> int:
    """Measure this machine, simulate sequence-parallel attention on it, and say how far the simulated times are off.

    usage: lctrain bench simulate [strategies=ring,usp] [cp=2,4] [seq=4096,8192] [name=value ...]

      lctrain bench simulate
      lctrain bench simulate cp=4 seq=16384 kv_heads=2 dtype=bf16 repeats=7
    """
    from lctrain.config.load import load
    from lctrain.config.simulate import SimulateBenchConfig

    config = load(SimulateBenchConfig, "bench_simulate", args)
    from lctrain.bench.simulate import bench_simulate

    return bench_simulate(config)


def _plan(args: list[str]) -> int:
    """Measure this machine, plan some layouts on it, and say how far steps and memory of the real engines are from that.

    usage: lctrain bench plan [model=small] [seq=2048] [cases=fsdp2,tp2] [name=value ...]

    Exit status 1 if bytes of weights, gradients or optimizer state are not those planned.

      lctrain bench plan
      lctrain bench plan model=tiny seq=1024 steps=5 output=plan.json
    """
    from lctrain.config.bench_plan import PlanBenchConfig
    from lctrain.config.load import load

    config = load(PlanBenchConfig, "bench_plan", args)
    from lctrain.bench.plan import bench_plan

    return bench_plan(config)


def _ssd(args: list[str]) -> int:
    """Time the state-space scan of Mamba-2, or a whole layer, beside transformers' torch path and the recurrence.

    usage: lctrain bench ssd [part=layer] [seq=8192,16384] [name=value ...]

      lctrain bench ssd output=ssd.json
      lctrain bench ssd part=layer d_model=512 heads=16 seq=8192
      lctrain bench ssd documents=12 dtype=bf16
    """
    from lctrain.config.bench_ssd import SsdBenchConfig
    from lctrain.config.load import load

    config = load(SsdBenchConfig, "bench_ssd", args)
    from lctrain.bench.ssd import bench_ssd

    return bench_ssd(config)


def _checkpoint(args: list[str]) -> int:
    """Time how long a step waits for a checkpoint, at once and in the background, beside torch.save.

    usage: lctrain bench checkpoint [mb=1000] [folder=.] [name=value ...]

      lctrain bench checkpoint mb=300
      lctrain bench checkpoint folder=/scratch output=checkpoint.json
    """
    from lctrain.config.bench_checkpoint import CheckpointBenchConfig
    from lctrain.config.load import load

    config = load(CheckpointBenchConfig, "bench_checkpoint", args)
    from lctrain.bench.checkpoint import bench_checkpoint

    return bench_checkpoint(config)


def _moe(args: list[str]) -> int:
    """Time a mixture of experts, or its experts alone, beside loops over experts and a dense network of as many operations.

    usage: lctrain bench moe [part=layer] [experts=8,64] [seq=8192] [name=value ...]

      lctrain bench moe output=moe.json
      lctrain bench moe part=layer top_k=8 experts=128 d_ff=96 dtype=bf16
    """
    from lctrain.config.bench_moe import MoeBenchConfig
    from lctrain.config.load import load

    config = load(MoeBenchConfig, "bench_moe", args)
    from lctrain.bench.moe import bench_moe

    return bench_moe(config)


def _convert(args: list[str]) -> int:
    """Time conversions of a made-up model beside a plain copy of its files, and count the memory that they take.

    usage: lctrain bench convert [gb=3] [family=llama] [name=value ...]

      lctrain bench convert
      lctrain bench convert gb=0.5 family=mixtral folder=/scratch
    """
    from lctrain.config.convert import ConvertBenchConfig
    from lctrain.config.load import load

    config = load(ConvertBenchConfig, "bench_convert", args)
    from lctrain.bench.convert import bench_convert

    return bench_convert(config)
