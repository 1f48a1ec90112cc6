"""A training state is a nested dict; a checkpoint is flat. Names join the keys with `/`: `model/layers.0.norm.weight`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

State = dict[str, Any]


def tensors_of(state: State) -> dict[str, torch.Tensor]:
    """The tensors of a state by flat name, detached and sharing memory; empty tensors included."""
    return {name: leaf.detach() for name, leaf in _leaves(state) if isinstance(leaf, torch.Tensor)}


def values_of(state: State) -> dict[str, Any]:
    """Everything else by flat name: numbers, texts, lists; they go into the manifest, so that no pickle is ever needed."""
    return {name: leaf for name, leaf in _leaves(state) if not isinstance(leaf, torch.Tensor)}


def put_values(state: State, values: dict[str, Any]) -> None:
    """Replace the non-tensors of a state in place, with tuples where it had tuples."""
    for name in values_of(state):
        *path, last = name.split("/")
        folder = state
        for key in path:
            folder = folder[key]
        folder[last] = _like(folder[last], values[name])


def global_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """Size of each tensor over all ranks (a DTensor counts as a whole)."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


def shape_text(tensor: torch.Tensor) -> str:
    """`[512, 64] float32`, for messages; the global shape of a DTensor."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{list(tensor.shape)} {kind}" + (" (sharded)" if isinstance(tensor, DTensor) else "")


def _like(old: Any, new: Any) -> Any:
    """A value from JSON, which has only lists, with tuples where the old value had them."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: _like(old.get(key), value) for key, value in new.items()}
    if isinstance(old, list | tuple) and isinstance(new, list):
        return type(old)(_like(old[i] if i < len(old) else None, value) for i, value in enumerate(new))
    return new


def _leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if not isinstance(key, str) or "/" in key:
            raise TypeError(f"a state's keys are texts without '/', found {key!r} under {prefix or 'its root'!r}")
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
