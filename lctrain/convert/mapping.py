"""WeightMap: the rules of one model, checked against what there is, and carried out in either direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lctrain.config.model import ModelConfig
from lctrain.convert.rules import Joined, Rule, Same, Stacked, same
from lctrain.convert.stream import Info, Source
from lctrain.errors import UserError
from lctrain.models.model import LanguageModel
from lctrain.models.place import Family, parameter_places

ROWS_OF_VOCABULARY = ("embedding", "head.weight")
"""Tensors with a row per token id: padded with zeros where our vocabulary is larger, cut where theirs is smaller."""

BLOCK_BYTES = 2 * 2**20
"""Larger tensors are moved in blocks of rows of about this size, where the rule allows it: small enough to stay in a core's
cache between reading and writing, and in memory that the allocator has at hand; twice as fast as blocks of 32 MiB."""


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
        """Their tensors in blocks of rows, from ours."""
        for rule in self.rules:
            if isinstance(rule.operation, Same) and not rule.operation.taps:
                (ours,), (theirs,) = rule.ours, rule.theirs
                yield theirs, _in_blocks(source, ours, self.cut_shape(ours))
            elif isinstance(rule.operation, Stacked):
                for expert, name in enumerate(rule.theirs):
                    yield name, iter([source.read(rule.ours[0], slice(expert, expert + 1))[0]])
            elif _by_expert(rule):
                yield rule.theirs[0], self._expert_blocks(rule, source)
            else:
                ours_whole = [self._cut(name, source.read(name)) for name in rule.ours]
                for name, part in zip(rule.theirs, rule.operation.to_theirs(ours_whole), strict=True):
                    yield name, iter([part])

    def _expert_blocks(self, rule: Rule, source: Source) -> Iterator[Tensor]:
        for expert in range(self.ours[rule.ours[0]].shape[0]):
            yield rule.operation.to_theirs([source.read(name, slice(expert, expert + 1)) for name in rule.ours])[0]

    def cut_shape(self, name: str) -> torch.Size:
        """A tensor of ours as theirs has it: with their rows of the vocabulary."""
        shape = self.ours[name].shape
        return torch.Size((self.vocabulary, *shape[1:])) if name in ROWS_OF_VOCABULARY else shape

    def _cut(self, name: str, x: Tensor) -> Tensor:
        return x[: self.vocabulary] if name in ROWS_OF_VOCABULARY else x


class Translated:
    """A Source of ours over a source of theirs. What one rule gives at once is kept until another rule is used."""

    def __init__(self, mapping: WeightMap, theirs: Source) -> None:
        self.mapping, self._theirs = mapping, theirs
        self._rules = {name: rule for rule in mapping.rules for name in rule.ours}
        self.infos = {
            name: Info(mapping.ours[name].shape, theirs.infos[rule.theirs[0]].dtype) for name, rule in self._rules.items()
        }
        self._last: tuple[Rule, dict[str, Tensor]] | None = None

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """See Source."""
        rule = self._rules[name]
        if isinstance(rule.operation, Stacked):
            chosen = [self._theirs.read(each) for each in (rule.theirs if rows is None else rule.theirs[rows])]
            return chosen[0].unsqueeze(0) if len(chosen) == 1 else torch.stack(chosen)
        if _by_expert(rule) and rows is not None:
            shapes = [self.mapping.ours[each].shape for each in rule.ours]
            experts = self._theirs.read(rule.theirs[0], rows)
            parts = rule.operation.to_ours([experts], [torch.Size((len(experts), *shape[1:])) for shape in shapes])
            return parts[rule.ours.index(name)]
        if isinstance(rule.operation, Same) and not rule.operation.taps:
            return self._same(rule, name, rows)
        if self._last is None or self._last[0] != rule:
            self._last = None
            shapes = [self.mapping.cut_shape(each) for each in rule.ours]
            parts = rule.operation.to_ours([self._theirs.read(each) for each in rule.theirs], shapes)
            self._last = (rule, dict(zip(rule.ours, parts, strict=True)))
        whole = self._last[1][name]
        return whole if rows is None else whole[rows]

    def _same(self, rule: Rule, name: str, rows: slice | None) -> Tensor:
        whole, there = self.infos[name].shape, self._theirs.infos[rule.theirs[0]].shape
        if len(whole) != len(there) or whole == there:  # reshaped, or just as it is
            x = self._theirs.read(rule.theirs[0], rows)
            return x if rows is not None else x.reshape(whole)
        first, last, _ = (rows or slice(None)).indices(whole[0])
        held = self._theirs.read(rule.theirs[0], slice(min(first, there[0]), min(last, there[0])))
        return torch.cat([held, held.new_zeros(last - first - held.shape[0], *whole[1:])])


def _by_expert(rule: Rule) -> bool:
    """Whether its tensors can be taken expert by expert on both sides."""
    return isinstance(rule.operation, Joined) and rule.operation.axis == 1


def _in_blocks(source: Source, name: str, shape: torch.Size) -> Iterator[Tensor]:
    """A tensor's first shape[0] rows."""
    info = source.infos[name]
    if info.bytes <= BLOCK_BYTES or not shape:
        x = source.read(name)
        yield x[: shape[0]] if shape else x
        return
    step = max(1, BLOCK_BYTES * info.shape[0] // info.bytes)
    for start in range(0, shape[0], step):
        yield source.read(name, slice(start, min(start + step, shape[0])))
