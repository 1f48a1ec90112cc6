"""Comparing with transformers' own modules: skip where it is not installed, and which of its tensors is which of ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lctrain.verify.blocks.compare import Errors, errors

Tensors = Mapping[str, Tensor]
Translate = Callable[[Tensors], dict[str, Tensor]]
"""Their tensors -> ours, by name. Linear, so that it holds for weights and gradients alike."""


class Skipped(Exception):
    """A case that cannot run here; the message says why."""


def need_transformers() -> None:
    """Skipped if transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise Skipped("transformers is not installed: pip install 'lctrain[hf]'")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; zeros where none came."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}


@torch.no_grad()
def take_weights(ours: nn.Module, theirs: nn.Module, translate: Translate) -> None:
    """Copy their parameters into ours; every one of ours must get a value."""
    values = translate(dict(theirs.named_parameters()))
    own = dict(ours.named_parameters())
    assert own.keys() == values.keys(), set(own) ^ set(values)
    for name, parameter in own.items():
        parameter.copy_(values[name])


def compare_gradients(ours: nn.Module, theirs: nn.Module, translate: Translate) -> Errors:
    """Errors of all our parameters' gradients."""
    wanted = translate(gradients(theirs))
    return {f"d {name}": error for name, error in errors(gradients(ours), wanted).items()}


def halves_from_pairs(weight: Tensor, heads: int, rotated: int) -> Tensor:
    """Rows of a projection whose last `rotated` outputs per head are rotated as pairs (0, 1), (2, 3), ..., put into the order
    in which we rotate them, (0, rotated / 2), ...: the same scores, because queries and keys are reordered alike.

    weight: [heads * n, d_in].
    """
    per_head = weight.unflatten(0, (heads, -1))
    order = torch.cat([torch.arange(0, rotated, 2), torch.arange(1, rotated, 2)])
    kept, turned = per_head[:, :-rotated], per_head[:, -rotated:]
    return torch.cat([kept, turned[:, order]], dim=1).flatten(0, 1)
