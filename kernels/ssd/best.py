"""Which implementation of the state-space scan runs: mamba_ssm's Triton kernels on CUDA where they can, else the torch form.

Not run yet on a GPU: this file follows mamba_ssm's documented signature (2.x), and a test holds the call against it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from lctrain.kernels.ssd import chunked
from lctrain.kernels.ssd.chunked import CHUNK, Relay


def best_ssd(
    x: Tensor,
    dt: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    *,
    chunk: int = CHUNK,
    relay: Relay | None = None,
) -> tuple[Tensor, Tensor]:
    """As lctrain.kernels.ssd.chunked.ssd.

    mamba_ssm's kernel knows entering and leaving states and documents, but not a relay between rows: with one (a sequence that
    is spread over ranks) the torch form runs on CUDA too.
    """
    if mamba_ssm_fits(x, relay, chunk):
        return mamba_ssm(x, dt, A, B, C, D, initial_state, resets, chunk=chunk)
    return chunked.ssd(x, dt, A, B, C, D, initial_state, resets, chunk=chunk, relay=relay)


def mamba_ssm_fits(x: Tensor, relay: Relay | None, chunk: int) -> bool:
    """Whether mamba_ssm is installed and can do this."""
    power_of_two = chunk & (chunk - 1) == 0
    return x.is_cuda and x.shape[1] > 0 and relay is None and power_of_two and importlib.util.find_spec("mamba_ssm") is not None


def mamba_ssm(
    x: Tensor,
    dt: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    resets: Tensor | None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """mamba_chunk_scan_combined with our arguments. Its documents are numbers that the entering state's, 0, may continue."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    steps: Any = torch.ones(x.shape[:3], dtype=torch.float32, device=x.device) if dt is None else dt
    y, state = mamba_chunk_scan_combined(
        x,
        steps,
        A,
        B,
        C,
        chunk_size=chunk,
        D=D,
        initial_states=initial_state,
        seq_idx=None if resets is None else resets.cumsum(1, dtype=torch.int32),
        return_final_states=True,
    )
    return y, state
