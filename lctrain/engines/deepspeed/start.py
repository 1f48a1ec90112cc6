"""Importing DeepSpeed so that it neither builds kernels nor talks, and the accelerator that fits the run's device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from lctrain.errors import UserError


def start_deepspeed(device: torch.device) -> Any:
    """The package `deepspeed` (0.19.8), working on the default process group. Collective."""
    deepspeed = import_deepspeed(device)
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if get_accelerator().device_name() != device.type:  # this process has imported it for another device
        set_accelerator(_accelerator(device))
    if device.type == "cpu":
        # Else shared-memory collectives would be compiled, for 40 s, in every process; gloo does the work.
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {"deepspeed_shm_comm": False})
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # the only way to tell DeepSpeed; torchrun sets it as well
    deepspeed.comm.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
    return deepspeed


def import_deepspeed(device: torch.device) -> Any:
    """The package, in a second and in silence; UserError if it is not installed."""
    with patch.dict(os.environ, {"DS_ACCELERATOR": device.type}):  # read while importing, and then it would warn about the CPU
        try:
            import deepspeed
        except ModuleNotFoundError as error:
            if error.name != "deepspeed":
                raise
            raise UserError("engine.name=deepspeed needs DeepSpeed: pip install 'lctrain[deepspeed]'") from None
    # Whether an optimizer is Muon, which it asks of every one, would load torch's compiler, for seconds.
    with patch("torch.compile", _not_compiled):
        import deepspeed.runtime.zero.muon.muon_optimizer
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    logger.addFilter(_says_something)
    return deepspeed


def _not_compiled(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return function if function is not None else lambda decorated: decorated


def _says_something(record: logging.LogRecord) -> bool:
    """Not that a step was skipped, which the loop tells with the reason, nor that SequenceMeta may hide tensors: none of them
    needs a gradient."""
    text = record.getMessage()
    return "OVERFLOW! Skipping step" not in text and "unknown inputs or outputs type" not in text


def _accelerator(device: torch.device) -> Any:
    if device.type == "cuda":
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        return CUDA_Accelerator()
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    return CPU_Accelerator()
