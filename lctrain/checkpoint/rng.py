"""Random generators of a rank as tensors, so that a resumed run draws the numbers that the uninterrupted one would have."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

RNG = "rng"
"""Name of the part of a training state that holds each rank's generators."""


def rng_state(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """`{"<rank>": {"torch": ..., "numpy": ..., "python": ..., "cuda": ...}}`, the value of a state's key "rng".

    uint8 tensors; "cuda" (the current device's) only where CUDA is in use.
    """
    _, python_words, python_gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    generators = {
        "torch": torch.get_rng_state(),
        "numpy": _pack([*numpy["state"]["key"], numpy["state"]["pos"]], numpy["gauss"] if numpy["has_gauss"] else None),
        "python": _pack(python_words, python_gauss),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators["cuda"] = torch.cuda.get_rng_state()
    return {str(rank): generators}


def set_rng_state(state: dict[str, dict[str, torch.Tensor]]) -> None:
    """Put back what rng_state of this rank gave, or what a checkpoint has filled it with."""
    (generators,) = state.values()
    torch.set_rng_state(generators["torch"])
    words, gauss = _unpack(generators["numpy"])
    twister = {"key": np.array(words[:-1], np.uint32), "pos": words[-1]}
    waiting = {"has_gauss": int(gauss is not None), "gauss": gauss or 0.0}
    np.random.set_state({"bit_generator": "MT19937", "state": twister, **waiting})  # noqa: NPY002
    words, gauss = _unpack(generators["python"])
    random.setstate((3, tuple(words), gauss))
    if "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])


def _pack(words: Any, gauss: float | None) -> torch.Tensor:
    """A Mersenne twister: 624 words and a position, whether a second normal number is waiting, and that number."""
    header = np.array([*words, gauss is not None], np.uint32).tobytes()
    return torch.frombuffer(bytearray(header + np.float64(gauss or 0.0).tobytes()), dtype=torch.uint8)


def _unpack(packed: torch.Tensor) -> tuple[list[int], float | None]:
    data = packed.numpy().tobytes()
    *words, has_gauss = np.frombuffer(data[:-8], np.uint32).tolist()
    return words, np.frombuffer(data[-8:], np.float64).item() if has_gauss else None
