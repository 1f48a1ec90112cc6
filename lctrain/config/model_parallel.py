"""Whether a model can be divided over tensor-parallel ranks and pipeline stages, asked before any process starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lctrain.models.pattern import parse_pattern, pipeline_cuts

if TYPE_CHECKING:
    from lctrain.config.model import ModelConfig
    from lctrain.config.schema import TrainConfig


def check_model_parallel(config: TrainConfig, dp: int) -> None:
    """ValueError that names the value that does not divide, and what would."""
    _check_tensor(config.model, config.parallel.tp)
    _check_stages(config)
    _check_interleaving(config, dp)


def divided_by_tp(model: ModelConfig) -> dict[str, int]:
    """What every tp rank must get an equal share of, by its name in the config."""
    symbols = {layer.symbol for layer in parse_pattern(model.pattern)}
    parts: dict[str, int] = {}
    if symbols & {"*", "W"}:
        parts["model.attention.n_heads"] = model.attention.n_heads
    if "+" in symbols:
        parts["model.latent_attention.n_heads"] = model.latent_attention.n_heads
    if "M" in symbols:
        parts["model.mamba.n_groups"] = model.mamba.n_groups
    if "L" in symbols:
        parts["model.linear_attention.n_heads"] = model.linear_attention.n_heads
    if "E" in symbols and model.moe.shared_d_ff:
        parts["model.moe.shared_d_ff"] = model.moe.shared_d_ff
    if "-" in symbols:
        parts["model.mlp.d_ff"] = model.mlp.d_ff
    return parts


def _fits_tensor(model: ModelConfig, tp: int) -> str | None:
    """What is wrong with this tp, or None."""
    for name, size in divided_by_tp(model).items():
        if size % tp:
            return f"does not divide {name}={size}"
    if -(-model.vocab_size // tp) * (tp - 1) >= model.vocab_size:
        return f"leaves the last rank without a row of model.vocab_size={model.vocab_size}"
    symbols = {layer.symbol for layer in parse_pattern(model.pattern)}
    kv_heads = model.attention.n_kv_heads
    if symbols & {"*", "W"} and kv_heads % tp and tp % kv_heads:
        return f"neither divides model.attention.n_kv_heads={kv_heads} nor is a multiple of it"
    return None


def _check_tensor(model: ModelConfig, tp: int) -> None:
    wrong = _fits_tensor(model, tp)
    if wrong is None:
        return
    fits = [str(size) for size in range(1, 2 * tp + 1) if _fits_tensor(model, size) is None]
    raise ValueError(f"parallel.tp={tp} {wrong}; for this model it can be {', '.join(fits)}")


def _check_stages(config: TrainConfig) -> None:
    parallel, pattern = config.parallel, config.model.pattern
    stages = parallel.pp * parallel.virtual_stages
    cuts, layers = pipeline_cuts(pattern), len(parse_pattern(pattern))
    what = f"parallel.pp={parallel.pp}" + (
        f" x parallel.virtual_stages={parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""
    )
    if stages > layers:
        raise ValueError(
            f"{what} is {stages} stages for {layers} sublayers of model.pattern {pattern!r}; take at most {layers}"
        )
    if cuts and stages > 1 and len(cuts) + 1 != stages:
        raise ValueError(
            f"model.pattern {pattern!r} has {len(cuts)} cuts '|', so {len(cuts) + 1} stages, but {what} is {stages}:"
            " change one, or drop the cuts to have stages balanced by cost"
        )


def _check_interleaving(config: TrainConfig, dp: int) -> None:
    parallel, trainer = config.parallel, config.trainer
    if parallel.virtual_stages == 1:
        return
    if config.engine.name != "megatron":
        raise ValueError(f"parallel.virtual_stages={parallel.virtual_stages} needs engine.name=megatron")
    if parallel.pp == 1:
        raise ValueError(f"parallel.virtual_stages={parallel.virtual_stages} needs parallel.pp of 2 or more: stages interleave")
    passes = trainer.global_batch // (dp * trainer.micro_batch)
    if passes % parallel.pp:
        unit = dp * trainer.micro_batch * parallel.pp
        nearest = max(1, round(trainer.global_batch / unit)) * unit
        raise ValueError(
            f"trainer.global_batch={trainer.global_batch} makes {passes} micro-batches, not a multiple of"
            f" parallel.pp={parallel.pp}, which parallel.virtual_stages={parallel.virtual_stages} needs;"
            f" nearest that fits: {nearest}"
        )
