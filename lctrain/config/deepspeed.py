"""DeepSpeed's own config beside ours: what contradicts ours is refused, what is unknown too, and the rest is passed on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lctrain.config.fields import closest

if TYPE_CHECKING:
    from lctrain.config.schema import TrainConfig

PASSED = (
    *("aio", "checkpoint", "comms_logger", "communication_data_type", "compile", "csv_monitor", "comet", "disable_python_gc"),
    *("dump_state", "flops_profiler", "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients"),
    *("seq_parallel_communication_data_type", "steps_per_print", "tensorboard", "timers", "vocabulary_size", "wandb"),
    *("wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_optimization"),
)
"""Top-level keys that reach DeepSpeed as they are given (of zero_optimization all but `stage`)."""

CHECKED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("fp16", "bf16", "bfloat16", "optimizer", "scheduler"),
)
"""Top-level keys that may say what our own settings say."""

REFUSED = {
    **dict.fromkeys(("activation_checkpointing",), "set engine.activation_checkpointing"),
    **dict.fromkeys(("tensor_parallel", "autotp_size"), "set parallel.tp"),
    **dict.fromkeys(("expert_parallel", "use_data_before_expert_parallelism"), "set parallel.ep and parallel.etp"),
    **dict.fromkeys(("sequence_parallel_size", "data_parallel_size"), "set parallel.cp and parallel.dp"),
    "pipeline": "set parallel.pp, and cuts `|` in model.pattern",
    **dict.fromkeys(("data_types", "torch_autocast", "amp"), "set engine.dtype"),
    **dict.fromkeys(("curriculum_learning", "data_efficiency", "dataloader_drop_last"), "set trainer.stages and data.*"),
    **dict.fromkeys(("zero_force_ds_cpu_optimizer", "elasticity", "autotuning", "hybrid_engine"), "drop it"),
    **dict.fromkeys(("gradient_allreduce_op", "managed_gradient_accumulation"), "drop it: gradients are averaged here"),
    **dict.fromkeys(("compression_training", "weight_quantization", "progressive_layer_drop"), "drop it: it changes the model"),
}
"""Top-level keys of DeepSpeed that have no place beside our settings, and what to do instead."""

ADAMW = {"lr": "lr", "eps": "eps", "weight_decay": "weight_decay"}
"""Parameters of DeepSpeed's Adam -> settings of optim."""


def checked_config(config: TrainConfig) -> dict[str, Any]:
    """What of engine.deepspeed_config is passed on to DeepSpeed."""
    return {key: value for key, value in _given(config).items() if key in PASSED}


def zero_stage(config: TrainConfig) -> int:
    """engine.zero, or the stage that engine.deepspeed_config says, or 1."""
    if config.engine.zero is not None:
        return config.engine.zero
    zero = _given(config).get("zero_optimization", {})
    stage = zero.get("stage", 1) if isinstance(zero, dict) else 1
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"{_source(config)}: zero_optimization.stage={stage} must be 0, 1, 2 or 3")
    return int(stage)


def check_deepspeed(config: TrainConfig, dp: int) -> None:
    """ValueError with both values and the fix for what contradicts our settings or cannot work.

    dp: data-parallel size.
    """
    engine = config.engine
    if engine.name != "deepspeed":
        for name in ("zero", "deepspeed_config"):
            if getattr(engine, name) is not None:
                raise ValueError(f"engine.{name} is for engine.name=deepspeed, but engine.name={engine.name}; drop one of them")
        return
    if engine.data_parallel != "ddp":
        raise ValueError(
            f"engine.data_parallel={engine.data_parallel} is for engine.name=torch; with engine.name=deepspeed, engine.zero=3"
            " shards weights, gradients and optimizer state"
        )
    given, source = _given(config), _source(config)
    for key in given:
        if key in REFUSED:
            raise ValueError(f"{source}: {key} is not DeepSpeed's to decide here; {REFUSED[key]}")
        if key not in (*PASSED, *CHECKED):
            meant = closest(key, (*PASSED, *CHECKED))
            hint = f"did you mean {meant}?" if meant else f"known are {', '.join(sorted((*PASSED, *CHECKED)))}"
            raise ValueError(f"{source}: unknown key {key}; {hint}")
    for key, theirs, name, ours in _pairs(config, given, dp):
        if theirs != "auto" and theirs != ours:
            raise ValueError(f"{source}: {key}={_shown(theirs)}, but {name}={_shown(ours)}; make them agree, or drop {key}")
    _check_zero(config, given, source)


def _pairs(config: TrainConfig, given: dict[str, Any], dp: int) -> Iterator[tuple[str, Any, str, Any]]:
    """(DeepSpeed's key, its value, our setting, its value) of all that both say."""
    trainer, optim = config.trainer, config.optim
    steps = trainer.global_batch // (dp * trainer.micro_batch)
    counts = {
        "train_batch_size": ("trainer.global_batch", trainer.global_batch),
        "train_micro_batch_size_per_gpu": ("trainer.micro_batch", trainer.micro_batch),
        "gradient_accumulation_steps": ("trainer.global_batch / (data-parallel size x trainer.micro_batch)", steps),
    }
    for key, (name, ours) in counts.items():
        if key in given:
            yield key, given[key], name, ours
    if "gradient_clipping" in given:
        yield "gradient_clipping", given["gradient_clipping"] or None, "optim.clip_norm", optim.clip_norm
    zero = _section(given, "zero_optimization")
    if "stage" in zero and config.engine.zero is not None:
        yield "zero_optimization.stage", zero["stage"], "engine.zero", config.engine.zero
    for key, dtype in (("fp16", "fp16"), ("bf16", "bf16"), ("bfloat16", "bf16")):
        section = _section(given, key)
        if section.get("enabled") not in (None, "auto"):
            ours_is = config.engine.dtype
            says = dtype if section["enabled"] else ours_is if ours_is != dtype else "another than " + dtype
            yield key, says, "engine.dtype", ours_is
    if "optimizer" in given:
        optimizer = _section(given, "optimizer")
        kind = optimizer.get("type", "AdamW")
        yield "optimizer.type", "AdamW" if str(kind).lower() in ("adam", "adamw") else kind, "the optimizer", "AdamW"
        params = _section(optimizer, "params")
        for key, theirs in params.items():
            if key == "betas":
                yield f"optimizer.params.{key}", theirs, "optim.beta1, optim.beta2", [optim.beta1, optim.beta2]
            elif key in ADAMW:
                yield f"optimizer.params.{key}", theirs, f"optim.{ADAMW[key]}", getattr(optim, ADAMW[key])
            elif key not in ("torch_adam", "adam_w_mode", "fused"):
                raise ValueError(f"{_source(config)}: optimizer.params.{key} has no counterpart in optim.*; drop it")
    if "scheduler" in given:
        kind = _section(given, "scheduler").get("type")
        yield "scheduler.type", kind, "optim.schedule.kind", config.optim.schedule.kind


def _check_zero(config: TrainConfig, given: dict[str, Any], source: str) -> None:
    zero, stage, pp = _section(given, "zero_optimization"), zero_stage(config), config.parallel.pp
    if stage >= 2 and pp > 1:
        raise ValueError(
            f"engine.zero={stage} cannot be combined with parallel.pp={pp}: a pipeline adds up gradients over micro-batches and"
            f" needs them whole; take engine.zero=1 with parallel.pp={pp}, or engine.zero={stage} with parallel.pp=1"
        )
    for key in ("zenflow", "elastic_checkpoint"):
        if zero.get(key):
            raise ValueError(f"{source}: zero_optimization.{key} is not supported; drop it")
    parameters, optimizer = (_device(zero, key) for key in ("offload_param", "offload_optimizer"))
    if parameters and stage != 3:
        raise ValueError(f"{source}: zero_optimization.offload_param needs engine.zero=3, but engine.zero={stage}")
    if optimizer and stage == 0:
        raise ValueError(f"{source}: zero_optimization.offload_optimizer needs engine.zero=1, 2 or 3, but engine.zero=0")
    if optimizer == "nvme":
        raise ValueError(
            f"{source}: zero_optimization.offload_optimizer.device=nvme puts moments where our checkpoints cannot reach them;"
            " take cpu"
        )


def _device(zero: dict[str, Any], key: str) -> str | None:
    device = _section(zero, key).get("device")
    return None if device in (None, "none") else str(device)


def _given(config: TrainConfig) -> dict[str, Any]:
    """engine.deepspeed_config as a mapping; ValueError if it cannot be read."""
    value = config.engine.deepspeed_config
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    import yaml

    from lctrain.config.render import load_yaml

    try:
        with open(value, encoding="utf-8") as file:
            tree = load_yaml(file.read())
    except OSError as error:
        raise ValueError(f"{_source(config)}: {error.strerror}; give the path of a JSON or YAML file, or a mapping") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{_source(config)}: neither JSON nor YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{_source(config)}: must hold a mapping, as DeepSpeed's JSON files do")
    return tree


def _source(config: TrainConfig) -> str:
    value = config.engine.deepspeed_config
    return f"engine.deepspeed_config={value}" if isinstance(value, str) else "engine.deepspeed_config"


def _section(tree: dict[str, Any], key: str) -> dict[str, Any]:
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"engine.deepspeed_config: {key}={_shown(value)} must be a mapping")
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
