"""What megatron-core 0.16.1 needs to build, run and train models on a machine without CUDA.

It names "cuda" in places where the tensors' own device would do. Inside `megatron_on_cpu()` these names mean the CPU, and
`let_mappings_run_on_cpu()` does the same for good in the one module that backward passes call outside of it. With CUDA present
both do nothing at all. Lines are those of megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import sys
import types
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
        if func is torch.Tensor.cuda:  # rope_utils.py:64, get_pos_emb_on_this_cp_rank: the indices of a rank's blocks
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # optimizer.py:671,690, distrib_optimizer.py:361,420,582 and clip_grads.py:167 ask for "torch.cuda.FloatTensor"
            kind = func(*args)
            asks = sys._getframe(1).f_globals.get("__name__", "")
            return kind.replace("torch.", "torch.cuda.") if asks.startswith("megatron.core.optimizer") else kind
        if kwargs.get("pin_memory"):  # the same indices; pinning needs a CUDA driver
            kwargs["pin_memory"] = False
        # device="cuda": the causal mask (transformer/utils.py), counts of tokens (schedules.py:596,983,2138), loss scale and
        # overflow flags (optimizer.py:481,485,907), the gradient norm (clip_grads.py:103,174), memory checks (utils.py:1207)
        if _is_cuda(kwargs.get("device")):
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
        # Asked for the place of what is made: rotary angles (rotary_pos_embedding.py:162), GlobalMemoryBuffer (utils.py:631),
        # gradient buffers (param_and_grad_buffer.py:800,806), what a stage receives (p2p_communication.py:313,321).
        "torch.cuda.current_device": lambda: torch.device("cpu"),
        # Before a received shape is read (p2p_communication.py:242,398); the CPU has read it already.
        "torch.cuda.synchronize": lambda *_: None,
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


def let_mappings_run_on_cpu() -> None:
    """Make tensor_parallel/mappings.py:141,181 put what it gathers and scatters on the CPU, if there is no CUDA; for good.

    Backward passes of every engine go through these mappings, so no context manager can be around them; only that module's own
    name `torch` is replaced.
    """
    from megatron.core.tensor_parallel import mappings

    if torch.cuda.is_available() or isinstance(mappings.torch, _TorchOnCpu):
        return
    mappings.torch = _TorchOnCpu("torch")


class _TorchOnCpu(types.ModuleType):
    """torch, but `torch.cuda.current_device()` is the CPU."""

    cuda = types.SimpleNamespace(current_device=lambda: torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
