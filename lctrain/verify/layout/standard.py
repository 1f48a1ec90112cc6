"""The standard matrix: layouts that between them use every engine, dimension, strategy and kind of block."""

from __future__ import annotations

from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.models.pattern import parse_pattern

DENSE = "model.pattern=*-W-*- model.attention.n_heads=4 model.attention.n_kv_heads=2 model.attention.window=40"
HYBRID = (
    "model.pattern=M-*LW- model.mamba.n_groups=2 model.attention.n_heads=4 model.attention.n_kv_heads=1"
    " model.attention.window=40"
)
MOE = (
    "model.pattern=*E*E model.attention.n_heads=4 model.attention.n_kv_heads=2 model.moe.balance.switch=0.1"
    " model.moe.balance.sequence=0.1 model.moe.balance.bias_rate=0.001 model.moe.shared_d_ff=32"
)
BOTH = "model=hybrid_tiny"
LATENT = "model.pattern=+-+- model.latent_attention.n_heads=4"

TORCH = {
    "dense torch cp2 ring": f"{DENSE} parallel.cp=2",
    "dense torch cp3 token_ring": f"{DENSE} parallel.cp=3 parallel.attention=token_ring",
    "dense torch cp4 ulysses balanced": f"{DENSE} parallel.cp=4 parallel.attention=ulysses parallel.layout=balanced",
    "dense torch cp3 ulysses, fewer heads than ranks, sinks": (
        f"{DENSE} parallel.cp=3 parallel.attention=ulysses model.attention.n_heads=2 model.attention.sinks=true"
    ),
    "dense torch cp4 usp fsdp": f"{DENSE} parallel.cp=4 parallel.attention=usp engine.data_parallel=fsdp",
    "dense torch dp2 cp2 all_gather striped": (
        f"{DENSE} parallel.dp=2 parallel.cp=2 parallel.attention=all_gather parallel.layout=striped"
    ),
    "dense torch cp2 tied, two rows, checkpointing": (
        f"{DENSE} parallel.cp=2 model.tie_embeddings=true trainer.micro_batch=2 engine.activation_checkpointing=layer"
    ),
    "latent torch cp3 ring": f"{LATENT} parallel.cp=3",
    "hybrid torch cp2": f"{HYBRID} parallel.cp=2",
    "hybrid torch cp3 contiguous fsdp": f"{HYBRID} parallel.cp=3 parallel.layout=contiguous engine.data_parallel=fsdp",
    "hybrid torch cp4 balanced": f"{HYBRID} parallel.cp=4 parallel.layout=balanced",
    "MoE torch dp2 ep2": f"{MOE} parallel.dp=2 parallel.ep=2",
    "MoE torch cp2 ep2 checkpointing": f"{MOE} parallel.cp=2 parallel.ep=2 engine.activation_checkpointing=layer",
    "MoE torch dp2 cp2 ep2 fsdp": f"{MOE} parallel.dp=2 parallel.cp=2 parallel.ep=2 engine.data_parallel=fsdp",
    "hybrid-MoE torch cp4 ep4": f"{BOTH} parallel.cp=4 parallel.ep=4",
}
MEGATRON = {
    "dense megatron tp2": f"{DENSE} parallel.tp=2",
    "dense megatron tp4, fewer KV heads": f"{DENSE} parallel.tp=4",
    "dense megatron dp2, whole optimizer": f"{DENSE} parallel.dp=2 engine.distributed_optimizer=false",
    "dense megatron tp2 cp2 token_ring": f"{DENSE} parallel.tp=2 parallel.cp=2 parallel.attention=token_ring",
    "dense megatron pp2 tied": f"{DENSE} parallel.pp=2 model.tie_embeddings=true",
    "dense megatron pp2 cut by hand": f"{DENSE.replace('*-W-*-', '*-W-|*-')} parallel.pp=2",
    "dense megatron pp2 cp2": f"{DENSE} parallel.pp=2 parallel.cp=2",
    "dense megatron pp2 cp2 interleaved": f"{DENSE} parallel.pp=2 parallel.cp=2 parallel.virtual_stages=2",
    "dense megatron tp2 cp2 pp2": f"{DENSE} parallel.tp=2 parallel.cp=2 parallel.pp=2",
    "dense megatron tp2 dp2, odd vocabulary": f"{DENSE} parallel.tp=2 parallel.dp=2 model.vocab_size=251",
    "dense megatron tp2 pp2 tied, odd vocabulary": (
        f"{DENSE} parallel.tp=2 parallel.pp=2 model.tie_embeddings=true model.vocab_size=251"
    ),
    "latent megatron tp2 cp2": f"{LATENT} parallel.tp=2 parallel.cp=2",
    "hybrid megatron tp2": f"{HYBRID} parallel.tp=2",
    "hybrid megatron pp2 cp2": f"{HYBRID} parallel.pp=2 parallel.cp=2",
    "MoE megatron tp2 cp2 ep2": f"{MOE} parallel.tp=2 parallel.cp=2 parallel.ep=2",
    "MoE megatron tp2 cp2 ep4": f"{MOE} parallel.tp=2 parallel.cp=2 parallel.ep=4",
    "MoE megatron tp2 cp2 ep2 etp2": f"{MOE} parallel.tp=2 parallel.cp=2 parallel.ep=2 parallel.etp=2",
    "MoE megatron tp2 ep2 pp2": f"{MOE} parallel.tp=2 parallel.ep=2 parallel.pp=2",
    "hybrid-MoE megatron pp2 cp2 ep2 ulysses": f"{BOTH} parallel.pp=2 parallel.cp=2 parallel.ep=2 parallel.attention=ulysses",
}
DEEPSPEED = {
    "dense deepspeed zero1 cp2": f"{DENSE} engine.zero=1 parallel.cp=2",
    "dense deepspeed zero2 dp2 cp2": f"{DENSE} engine.zero=2 parallel.dp=2 parallel.cp=2",
    "dense deepspeed zero3 cp3 ulysses": f"{DENSE} engine.zero=3 parallel.cp=3 parallel.attention=ulysses",
    "dense deepspeed zero1 tp2 cp2": f"{DENSE} engine.zero=1 parallel.tp=2 parallel.cp=2",
    "dense deepspeed zero2 tp2 cp2": f"{DENSE} engine.zero=2 parallel.tp=2 parallel.cp=2",
    "dense deepspeed zero3 tp2 cp2": f"{DENSE} engine.zero=3 parallel.tp=2 parallel.cp=2",
    "dense deepspeed zero3 tp2 cp2, odd vocabulary": (
        f"{DENSE} engine.zero=3 parallel.tp=2 parallel.cp=2 model.vocab_size=251"
    ),
    "dense deepspeed pp2 cp2": f"{DENSE} engine.zero=0 parallel.pp=2 parallel.cp=2",
    "dense deepspeed zero1 pp2 tied": f"{DENSE} engine.zero=1 parallel.pp=2 model.tie_embeddings=true",
    "hybrid deepspeed zero3 cp2": f"{HYBRID} engine.zero=3 parallel.cp=2",
    "MoE deepspeed zero1 dp2 ep2": f"{MOE} engine.zero=1 parallel.dp=2 parallel.ep=2",
    "MoE deepspeed zero3 cp2 ep2": f"{MOE} engine.zero=3 parallel.cp=2 parallel.ep=2",
    "hybrid-MoE deepspeed zero3 dp2 cp2 ep2": f"{BOTH} engine.zero=3 parallel.dp=2 parallel.cp=2 parallel.ep=2",
}

MATRIX: dict[str, str] = {
    **TORCH,
    **{name: f"{words} engine.name=megatron" for name, words in MEGATRON.items()},
    **{name: f"{words} engine.name=deepspeed" for name, words in DEEPSPEED.items()},
}
"""Name -> overrides of `lctrain train`."""

QUICK = (
    "dense torch cp3 token_ring",
    "dense torch cp4 usp fsdp",
    "latent torch cp3 ring",
    "hybrid torch cp4 balanced",
    "MoE torch cp2 ep2 checkpointing",
    "dense megatron pp2 cp2 interleaved",
    "hybrid megatron tp2",
    "MoE megatron tp2 cp2 ep4",
    "dense deepspeed zero2 dp2 cp2",
    "MoE deepspeed zero3 cp2 ep2",
)
"""Ten that between them use every engine, dimension and block."""


def load_layout(overrides: str) -> TrainConfig:
    """A layout of the matrix, as a user's command line would give it."""
    return load(TrainConfig, "train", [*overrides.split(), "run_dir=unused"])


def grid_of(config: TrainConfig) -> dict[str, list[str]]:
    """For a model whose config names no layout: name -> further overrides, over context and expert parallelism and layouts."""
    moe = any(layer.symbol == "E" for layer in parse_pattern(config.model.pattern))
    found = {}
    for cp in (1, 2, 3, 4):
        for ep in (1, 2, 4) if moe else (1,):
            dp = 1
            while dp * cp % ep:
                dp += 1
            if dp * cp == 1 or dp * cp > 4 or (moe and config.model.moe.n_experts % ep):
                continue
            for layout in ("zigzag", "contiguous", "balanced") if cp > 1 else ("zigzag",):
                sizes = [f"parallel.{name}={size}" for name, size in (("dp", dp), ("cp", cp), ("ep", ep)) if size > 1]
                name = " ".join(size.removeprefix("parallel.").replace("=", "") for size in sizes)
                found[f"{name} {layout}" if cp > 1 else name] = [
                    *sizes,
                    f"parallel.layout={layout}",
                    "launcher.processes=null",
                ]
    return found
