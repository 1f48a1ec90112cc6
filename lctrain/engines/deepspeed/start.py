"""Importing DeepSpeed so that it neither builds kernels nor talks, and the accelerator that fits the run's device."""

from __future__ import annotations

import logging
import os
from typing import Any
from unittest.mock import patch

import torch


def start_deepspeed(device: torch.device) -> Any:
    """The package `deepspeed` (0.19), on top of the default process group that exists already.

    On CPU its shared-memory collectives are left out: they would be compiled, for 40 s, in every process; gloo does the work.
    """
    with patch.dict(os.environ, {"DS_ACCELERATOR": device.type}):  # read while importing, and then it would warn about the CPU
        import deepspeed
        from deepspeed.accelerator import get_accelerator, set_accelerator
        from deepspeed.utils import logger
    logger.setLevel(logging.WARNING)
    logger.addFilter(_says_something)
    if get_accelerator().device_name() != device.type:  # another run of this process has imported it for another device
        set_accelerator(_accelerator(device))
    if device.type == "cpu":
        deepspeed.ops.__dict__.setdefault("__compatible_ops__", {"deepspeed_shm_comm": False})
    # Asked for by DeepSpeed wherever it names a device; launchers set it, our own does not.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    deepspeed.comm.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
    return deepspeed


def _says_something(record: logging.LogRecord) -> bool:
    """Not that a step was skipped, which the loop tells with the reason, nor that SequenceMeta may hide tensors: none needs a
    gradient."""
    text = record.getMessage()
    return "OVERFLOW! Skipping step" not in text and "unknown inputs or outputs type" not in text


def _accelerator(device: torch.device) -> Any:
    if device.type == "cuda":
        from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

        return CUDA_Accelerator()
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    return CPU_Accelerator()
