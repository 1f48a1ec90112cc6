"""Remarks that megatron-core and DeepSpeed make on every start and that a user of lctrain can do nothing about."""

from __future__ import annotations

import warnings

REMARKS = (
    ".*(Transformer Engine|Apex).* not installed.*",  # their torch counterparts serve
    ".*full scope is deprecated.*",  # a default of megatron's own
    ".*imports from `dynamic_context.py` will be removed.*",
    ".*attribute of a Tensor that is not a leaf Tensor is being accessed.*",  # views of a buffer
    ".*environment variable CUDA_DEVICE_MAX_CONNECTIONS.*",  # no overlap of the kind it is for
    r".*`torch\.distributed\.\w+` is deprecated.*",  # torch 2.13's new names of collectives
)


def quiet_libraries() -> None:
    """To be called before the first of them is imported."""
    for remark in REMARKS:
        warnings.filterwarnings("ignore", message=remark)
