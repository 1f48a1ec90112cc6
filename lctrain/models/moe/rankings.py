"""Rankings that a proof pins: who is a token's better expert, where rounding would decide.

Two scores that are equal to seven digits come out in one order on one layout and in the other on the next, and the token gets
another expert: a real difference, which says nothing about the layout. So one process records the scores by which it ranked,
and a layout ranks by those wherever its own are the same but for rounding. Where they are not, it uses its own, and the
difference shows. Weights, losses and gradients always come from its own scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lctrain.models.head_routing import HeadRouter
from lctrain.models.moe.router import Router
from lctrain.models.moe.tokens import Tokens

ROUNDING = 1e-4
"""Scores lie in 0 .. 1, beside biases of that size; those of two correct layouts differ by 1e-6, after some steps by 1e-5."""

Recorded = Mapping[tuple[str, str], tuple[Tensor, Tensor]]
"""(part, router) -> numbers of tokens, int64 [n], rising; scores [n, E]."""


class Rankings:
    """Records scores, or settles rankings by what was recorded.

    part: what runs now, to be set before every change of weights, samples or mode that lets one token have other scores.
    """

    def __init__(self, recorded: Recorded | None = None) -> None:
        self.part = ""
        self._recorded = recorded
        self._seen: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}

    def attach(self, model: nn.Module) -> None:
        """To all routers of a model, or of a piece of one whose layers have the names that they have in the whole."""
        for name, module in model.named_modules():
            if isinstance(module, Router | HeadRouter):
                module.settle = partial(self._settle, name)

    def recorded(self) -> Recorded:
        """All scores so far, a token's once in every part."""
        found = {}
        for key, seen in self._seen.items():
            numbers, scores = (torch.cat(parts) for parts in zip(*seen, strict=True))
            order = numbers.argsort(stable=True)
            first = numbers[order].diff(prepend=numbers.new_full((1,), -1)) > 0  # recomputed passes are seen again
            found[key] = numbers[order][first], scores[order][first]
        return found

    def _settle(self, router: str, tokens: Tokens, scores: Tensor) -> Tensor:
        """Scores to rank by, for a router's own scores [n, E]."""
        key, numbers = (self.part, router), (tokens.samples << 32) + tokens.positions
        if self._recorded is None:
            self._seen.setdefault(key, []).append((numbers, scores.detach().clone()))
            return scores
        if key not in self._recorded or not len(numbers):
            return scores
        known, theirs = self._recorded[key]
        at = torch.searchsorted(known, numbers).clamp(max=len(known) - 1)
        theirs = theirs[at].to(scores)
        same = (known[at] == numbers) & ((theirs - scores).abs().amax(-1) <= ROUNDING)
        return torch.where(same[:, None], theirs, scores)
