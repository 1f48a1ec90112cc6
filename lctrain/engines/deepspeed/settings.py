"""The config dict that DeepSpeed is given."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from lctrain.config.deepspeed import checked_config, zero_stage
from lctrain.config.fields import closest
from lctrain.config.schema import TrainConfig
from lctrain.errors import UserError
from lctrain.parallel.mesh import ProcessMesh


def deepspeed_config(config: TrainConfig, mesh: ProcessMesh, parameters: int) -> dict[str, Any]:
    """What the user's own file or mapping says, and what our settings mean in DeepSpeed's words.

    parameters: of the model, in all: buckets for its gradients need not be larger.
    """
    trainer = config.trainer
    given = checked_config(config)
    zero = {
        "reduce_bucket_size": min(parameters, 500_000_000),
        # It would replace torch.nn.functional.linear in the whole process.
        "memory_efficient_linear": False,
        **given.get("zero_optimization", {}),
        "stage": zero_stage(config),
    }
    return {
        **given,
        "train_micro_batch_size_per_gpu": trainer.micro_batch,
        "gradient_accumulation_steps": trainer.global_batch // (mesh.dp * trainer.micro_batch),
        # We clip, by the norm over all parameters; left out, it would be 1.
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the CPU too, and needs no compiler
        "steps_per_print": given.get("steps_per_print"),
        # With tensor parallelism DeepSpeed would send parts of activations, which are parts already, and corrupt them.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }


def check_by_deepspeed(settings: dict[str, Any], mpu: Any) -> None:
    """UserError in one line for what DeepSpeed itself does not accept, below the top-level keys."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedConfig(settings, mpu)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        fields = DeepSpeedZeroConfig.model_fields
        known = [*fields, *(str(field.alias) for field in fields.values() if field.alias)]
        meant = closest(name, known) if error.title == "DeepSpeedZeroConfig" and name not in known else None
        hint = f"; did you mean {meant}?" if meant else ""
        raise UserError(
            f"engine.deepspeed_config: DeepSpeed does not accept {name}={first['input']}: {first['msg']}{hint}"
        ) from None
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"engine.deepspeed_config: DeepSpeed does not accept it: {' '.join(str(error).split())}") from None
