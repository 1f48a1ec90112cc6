"""The standard matrix: layouts that between them use every engine, dimension, strategy and kind of block."""

from __future__ import annotations

from lctrain.config.load import load
from lctrain.config.schema import TrainConfig
from lctrain.models.pattern import parse_pattern

DENSE = "model.pattern=*-W-*- model.attention.n_heads=4 model.attention.n_kv_heads=2 model.attention.window=40"

MATRIX: dict[str, str] = {
    "dense torch cp2 ring": f"{DENSE} parallel.cp=2",
    "dense torch cp3 token_ring": f"{DENSE} parallel.cp=3 parallel.attention=token_ring",
    "dense torch cp4 ulysses balanced": f"{DENSE} parallel.cp=4 parallel.attention=ulysses parallel.layout=balanced",
    "dense torch dp2 cp2 usp fsdp": f"{DENSE} parallel.dp=2 parallel.cp=4 parallel.attention=usp engine.data_parallel=fsdp",
    "dense torch cp2 tied, two rows, checkpointing": (
        f"{DENSE} parallel.cp=2 model.tie_embeddings=true trainer.micro_batch=2 engine.activation_checkpointing=layer"
    ),
}
"""Name -> overrides of `lctrain train`; launcher.processes follows from the grid."""


def load_layout(overrides: str) -> TrainConfig:
    """A layout of the matrix, as a user's command line would give it."""
    words = overrides.split()
    sizes = dict(word.split("=") for word in words if word.startswith("parallel."))
    processes = 1
    for name in ("dp", "cp", "tp", "pp"):
        processes *= int(sizes.get(f"parallel.{name}", 1))
    return load(TrainConfig, "train", [*words, f"launcher.processes={processes}", "run_dir=unused"])


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
                    f"launcher.processes={dp * cp}",
                ]
    return found
