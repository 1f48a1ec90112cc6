"""The device a run computes on: choice, peak arithmetic rate, memory in use."""

from __future__ import annotations

import resource
import time

import torch
import torch.distributed as dist

from lctrain.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Dense bf16 tensor-core TFLOP/s from NVIDIA's data sheets; SXM parts where there are several.
_PUBLISHED_BF16 = {"H200": 989.5, "H100": 989.5, "A100": 312.0, "A10": 125.0, "L40S": 362.0, "B200": 2250.0}


def choose_device(wanted: str, local_rank: int = 0, local_size: int = 1) -> torch.device:
    """The torch device for engine.device = auto | cpu | cuda; all `local_size` ranks of a machine get the same or UserError."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("engine.device=cuda, but torch sees no CUDA device here; use engine.device=cpu or auto")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes on this machine need a CUDA device each, but it has {torch.cuda.device_count()}:"
            " use as many processes as devices, or engine.device=cpu"
        )
    return torch.device("cuda", local_rank)


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of one process that count as 100 %, and where the figure comes from. Collective, equal on all ranks.

    A GPU's published dense rate if it is known here (bf16). Otherwise the mean rate of matrix products that all ranks run at
    the same time, so that processes which share a machine's cores share its peak.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        published = published_flops(name)
        if published is not None:
            return published, f"{name}, published"
    together = dist.is_initialized() and dist.get_world_size() > 1
    if together:
        dist.barrier()
    rate = torch.tensor(gemm_flops(device, dtype), dtype=torch.float64)
    if together:
        dist.all_reduce(rate)
        rate /= dist.get_world_size()
    return float(rate), "measured matrix product"


def published_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s that the maker of the device of this name states, if known here."""
    for known, tera in sorted(_PUBLISHED_BF16.items(), key=lambda item: -len(item[0])):
        if known in name:
            return tera * 1e12
    return None


def gemm_flops(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.3) -> float:
    """Mean FLOP/s of square matrix products over about `seconds` (size: 1024 on CPU, 8192 on CUDA), after one to warm up."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    synchronise(device)
    products, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not products:
        a @ b
        synchronise(device)
        products += 1
    return 2 * size**3 * products / elapsed


def synchronise(device: torch.device) -> None:
    """Wait for all work queued on a CUDA device; nothing to do on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far, in MiB (2^20 bytes): allocated on a CUDA device, resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
