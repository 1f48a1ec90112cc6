"""What all block checks share: random weights, whole sequences on one process, and the error of outputs and all gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lctrain.config.model import ModelConfig
from lctrain.models.parallel import ModelParallel
from lctrain.models.pattern import parse_pattern
from lctrain.models.registry import build_mixer
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout, document_positions
from lctrain.parallel.mask import Borders
from lctrain.parallel.sequence import SequenceMeta

Errors = dict[str, float]
"""Relative error by tensor: largest difference over largest entry."""
Case = tuple[str, Callable[[], Errors]]

DOCUMENTS: tuple[Borders, ...] = ((0, 5, 6, 40), (0, 29))
"""Two rows of 40 tokens: documents of 5, 1 and 34 tokens; one of 29 and padding."""
LENGTH = 40


def packed(documents: tuple[Borders, ...] = DOCUMENTS, length: int = LENGTH) -> SequenceMeta:
    """Whole sequences on one process."""
    layout = SequenceLayout("zigzag", 1, length)
    return SequenceMeta(layout, RankGroup(), document_positions(documents, length), documents)


def random_mixer(symbol: str, config: ModelConfig, seed: int = 0) -> nn.Module:
    """The mixer of one symbol, fp32; matrices normal with the spread that keeps activations of order 1, vectors around 1."""
    mixer = build_mixer(parse_pattern(symbol)[0], config, ModelParallel())
    assert isinstance(mixer, nn.Module)
    randomise(mixer, seed)
    return mixer


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter values with which a mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 1 + 0.3 * noise)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted entry; NaN and inf count as inf."""
    if found.numel() == 0:
        return 0.0
    found, wanted = found.detach().double(), wanted.detach().double()
    scale = float(wanted.abs().max())
    error = float((found - wanted).abs().max()) / (scale if scale > 0 else 1.0)
    return error if math.isfinite(error) else math.inf


def errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Errors:
    """Of tensors by name; the names must agree."""
    assert found.keys() == wanted.keys(), set(found) ^ set(wanted)
    return {name: relative_error(found[name], wanted[name]) for name in wanted}


def run(
    forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[tuple[str, Tensor]], dy: Tensor
) -> dict[str, Tensor]:
    """y, the gradient of x and those of the parameters, for an upstream gradient dy."""
    leaf = x.detach().clone().requires_grad_()
    named = dict(parameters)
    y = forward(leaf)
    grads = torch.autograd.grad(y, [leaf, *named.values()], dy.to(y.dtype), materialize_grads=True)
    return {"y": y.detach(), "dx": grads[0], **{f"d {name}": grad for name, grad in zip(named, grads[1:], strict=True)}}


def inputs(d_model: int, seed: int = 1, rows: int = len(DOCUMENTS), length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Standard normal x and dy, [rows, length, d_model]."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(rows, length, d_model, generator=generator) for _ in range(2))
    return x, dy


def outside_documents(documents: tuple[Borders, ...], length: int) -> Tensor:
    """Where padding is: bool [rows, length]."""
    return torch.arange(length) >= torch.tensor([[borders[-1]] for borders in documents])


def against_oracle(mixer: nn.Module, oracle: Callable[[Tensor], Tensor], d_model: int) -> Errors:
    """A mixer on packed documents against a formula in the mixer's own parameters (fp64 if the formula widens them)."""
    x, dy = inputs(d_model)
    dy = dy.masked_fill(outside_documents(DOCUMENTS, LENGTH).unsqueeze(-1), 0.0)
    seq = packed()
    found = run(lambda x: mixer(x, seq), x, mixer.named_parameters(), dy)
    wanted = run(oracle, x, mixer.named_parameters(), dy)
    padding = outside_documents(DOCUMENTS, LENGTH)
    for tensors in (found, wanted):
        tensors["y"] = tensors["y"].masked_fill(padding.unsqueeze(-1), 0.0)
    return errors(found, wanted)


def packing(mixer: nn.Module, d_model: int) -> Errors:
    """Packed documents against every document run by itself: outputs and gradients."""
    x, dy = inputs(d_model)
    padding = outside_documents(DOCUMENTS, LENGTH).unsqueeze(-1)
    dy = dy.masked_fill(padding, 0.0)
    seq = packed()
    found = run(lambda x: mixer(x, seq), x, mixer.named_parameters(), dy)
    found["y"] = found["y"].masked_fill(padding, 0.0)
    wanted = {name: torch.zeros_like(tensor) for name, tensor in found.items()}
    for row, borders in enumerate(DOCUMENTS):
        for start, end in itertools.pairwise(borders):
            alone = packed(((0, end - start),), end - start)
            at = (slice(row, row + 1), slice(start, end))
            part = run(lambda x, seq=alone: mixer(x, seq), x[at], mixer.named_parameters(), dy[at])  # type: ignore[misc]
            for name, tensor in part.items():
                wanted[name][at if name in ("y", "dx") else ...] += tensor
    return errors(found, wanted)


def decoding(mixer: nn.Module, d_model: int, prompt: int = 7, length: int = 20) -> Errors:
    """One document token by token, after a prompt at once, against all of it at once."""
    x, _ = inputs(d_model, rows=2, length=length)
    with torch.no_grad():
        wanted = mixer(x, packed(((0, length),) * 2, length))
        state = mixer.new_state()  # type: ignore[operator]
        steps = [mixer.decode(x[:, :prompt], state)]  # type: ignore[operator]
        steps += [mixer.decode(x[:, at : at + 1], state) for at in range(prompt, length)]  # type: ignore[operator]
    return {"decoded": relative_error(torch.cat(steps, dim=1), wanted)}
