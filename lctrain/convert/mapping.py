"""WeightMap: the rules of one model, checked against what there is, and carried out in either direction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lctrain.config.model import ModelConfig
from lctrain.convert.lines import Recipe, line_shape, recipes
from lctrain.convert.rules import Rule, same
from lctrain.convert.stream import Info, Source
from lctrain.errors import UserError
from lctrain.models.model import LanguageModel
from lctrain.models.place import Family, parameter_places

ROWS_OF_VOCABULARY = ("embedding", "head.weight")
"""Tensors with a row per token id: padded with zeros where our vocabulary is larger, cut where theirs is smaller."""


def our_infos(config: ModelConfig) -> tuple[dict[str, Info], set[str]]:
    """Every tensor of a model of ours, fp32; and those that are so always: constants of recurrences, and buffers."""
    with torch.device("meta"):
        model = LanguageModel(config)
    states = {name for name, place in parameter_places(model).items() if place.family is Family.STATE}
    infos = {name: Info(tensor.shape, torch.float32) for name, tensor in model.state_dict().items()}
    return infos, states | {name for name, _ in model.named_buffers()}


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """Rules that cover a model of ours: each of its tensors exactly once.

    rules: those whose tensors the model has. ours: what the model has. fp32: those of ours that stay so. vocabulary: rows that
    theirs has.
    """

    rules: Sequence[Rule]
    ours: Mapping[str, Info]
    fp32: set[str]
    vocabulary: int

    @staticmethod
    def of(config: ModelConfig, rules: Iterable[Rule] | None, vocabulary: int | None = None) -> WeightMap:
        """Of all rules of a table, those for this model; without a table, every tensor is itself."""
        ours, fp32 = our_infos(config)
        if rules is None:
            rules = [same(name, name) for name in ours]
        kept = [rule for rule in rules if any(name in ours for name in rule.ours)]
        covered = [name for rule in kept for name in rule.ours]
        assert sorted(covered) == sorted(ours), f"the table must name each tensor once: {set(covered) ^ set(ours)}"
        return WeightMap(kept, ours, fp32, vocabulary or config.vocab_size)

    def their_infos(self, dtypes: Mapping[str, Info]) -> dict[str, Info]:
        """Theirs in the order in which `to_theirs` gives them, with the dtypes of ours."""
        found = {}
        for rule in self.rules:
            empty = [torch.empty(self.cut_shape(name), dtype=dtypes[name].dtype, device="meta") for name in rule.ours]
            parts = rule.operation.to_theirs(empty)
            found.update({name: Info(x.shape, x.dtype) for name, x in zip(rule.theirs, parts, strict=True)})
        return found

    def check_theirs(self, infos: Mapping[str, Info], dropped: Mapping[str, str]) -> list[str]:
        """Names of theirs that no rule knows; UserError for one that a rule misses, or that has another shape."""
        expected = self.their_infos(self.ours)
        for name, info in expected.items():
            if name not in infos:
                raise UserError(f"the input has no {name}, which its config asks for")
            if infos[name].shape != info.shape:
                raise UserError(f"the input has {name} as {list(infos[name].shape)}, its config makes it {list(info.shape)}")
        return [name for name in infos if name not in expected and not name.startswith(tuple(dropped))]

    def to_theirs(self, source: Source) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Their tensors in blocks of lines, from ours."""
        infos = self.their_infos(source.infos)
        for rule in self.rules:
            shapes = [self.cut_shape(name) for name in rule.ours]
            made = recipes(rule.operation.to_theirs, rule.ours, shapes, [source.infos[name] for name in rule.ours])
            for name, recipe in zip(rule.theirs, made, strict=True):
                yield name, recipe.blocks(source, infos[name])

    def cut_shape(self, name: str) -> torch.Size:
        """A tensor of ours as theirs has it: with their rows of the vocabulary."""
        shape = self.ours[name].shape
        return torch.Size((self.vocabulary, *shape[1:])) if name in ROWS_OF_VOCABULARY else shape


class Translated:
    """A Source of ours over a source of theirs."""

    def __init__(self, mapping: WeightMap, theirs: Source) -> None:
        self._mapping, self._theirs = mapping, theirs
        self._rules = {name: rule for rule in mapping.rules for name in rule.ours}
        self.infos = {name: Info(mapping.ours[name].shape, self._dtype(rule)) for name, rule in self._rules.items()}
        self._last: tuple[Rule, dict[str, Recipe]] | None = None

    def read(self, name: str, lines: slice | None = None) -> Tensor:
        """See Source."""
        rule = self._rules[name]
        if self._last is None or self._last[0] is not rule:
            self._last = (rule, self._recipes(rule))
        return self._last[1][name].read(self._theirs, self.infos[name], lines)

    def _recipes(self, rule: Rule) -> dict[str, Recipe]:
        """Rows of our vocabulary that they lack are zeros."""
        shapes = [line_shape(self._mapping.cut_shape(name)) for name in rule.ours]
        theirs = [self._theirs.infos[name] for name in rule.theirs]
        made = recipes(
            lambda numbers: rule.operation.to_ours(numbers, shapes), rule.theirs, [info.shape for info in theirs], theirs
        )
        return {name: recipe.lengthened(self.infos[name].lines) for name, recipe in zip(rule.ours, made, strict=True)}

    def _dtype(self, rule: Rule) -> torch.dtype:
        return functools.reduce(torch.promote_types, (self._theirs.infos[name].dtype for name in rule.theirs))
