"""What megatron-core 0.16 needs to build, run and train a GPTModel on a machine without CUDA.

It names "cuda" in places where the tensors' own device would do. Inside `megatron_on_cpu()` these names mean the CPU. With
CUDA present the context manager does nothing at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the arguments of torch functions, at about 2 microseconds a call; torch suspends it during backward.

    So layers may be recomputed in backward with our attention, which never says "cuda", but not with megatron-core's own.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:  # rope_utils.get_pos_emb_on_this_cp_rank: the indices of a rank's blocks
            return args[0]
        if kwargs.get("pin_memory"):  # the same indices; pinning needs a CUDA driver
            kwargs["pin_memory"] = False
        if _is_cuda(kwargs.get("device")):  # transformer/utils.get_default_causal_mask and its window: device="cuda"
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Inside, a GPTModel with use_cpu_initialization=True builds, runs and trains over gloo; nothing changes with CUDA."""
    if torch.cuda.is_available():
        yield
        return
    patches = {
        # RotaryEmbedding, GlobalMemoryBuffer and normalisation ask where to put what they make.
        "torch.cuda.current_device": lambda: torch.device("cpu"),
        # model_parallel_cuda_manual_seed seeds "the GPU's" generator; the CPU's takes its place.
        "torch.cuda.manual_seed": torch.manual_seed,
        "torch.cuda.get_rng_state": torch.get_rng_state,
        # The tracker around attention dropout saves and restores that generator, too.
        "megatron.core.tensor_parallel.random._get_cuda_rng_state": lambda *_, **__: torch.get_rng_state(),
        # torch would keep this for when CUDA starts, which is never.
        "megatron.core.tensor_parallel.random._set_cuda_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(patch(name, replacement))
        stack.enter_context(_CudaMeansCpu())
        yield
