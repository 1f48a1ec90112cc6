"""Family: everything that is known of one kind of Hugging Face model, as data that both directions use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lctrain.config.decode import decode
from lctrain.config.model import ModelConfig
from lctrain.convert.function import differences, symbols
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Rule
from lctrain.errors import UserError

Tree = dict[str, Any]


def _nothing(config: ModelConfig) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """A table. Ours are dotted settings of ModelConfig and parameters; theirs are keys of config.json and tensors.

    name, architecture: `model_type` and class in transformers.
    fields: our setting -> their key, where the values are the same. A setting that several of theirs or of ours decide is left
        to `read` and `write`.
    settings: ours that all models of the family have.
    only: their key -> the values under which our blocks compute the same; the first is written.
    assumed: their key -> what transformers takes where config.json is silent.
    harmless: further keys of theirs that no result depends on.
    read: fills the tree of our settings from their keys: at least `pattern`. write: the keys that it used, from ours.
    whole: rules of the tensors outside of layers. layers: of each symbol's, named relative to `layers.<n>.` and `prefix`.
    per_layer: how many of our sublayers one of their layers holds.
    dropped: prefixes of tensors of theirs that our model has no use for, and why.
    lacks: what models of the family may have that our blocks do not, so that these are refused.
    """

    name: str
    architecture: str
    fields: Mapping[str, str]
    read: Callable[[Keys, Tree], None]
    write: Callable[[ModelConfig], dict[str, Any]]
    whole: Sequence[Rule]
    layers: Callable[[ModelConfig], Mapping[str, Sequence[Rule]]]
    prefix: str = "model.layers.{layer}."
    per_layer: int = 2
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    assumed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    harmless: Sequence[str] = ()
    dropped: Callable[[ModelConfig], Mapping[str, str]] = _nothing
    lacks: str = ""

    def model_config(self, content: Mapping[str, Any], accepted: Sequence[str] = ()) -> tuple[ModelConfig, list[str]]:
        """Our config for a config.json, and the keys of it that ask for nothing; UserError that names what we lack."""
        keys = Keys(content, self.assumed)
        for key, allowed in self.only.items():
            keys.require(key, *allowed)
        tree: Tree = {"name": self.name}
        for setting, value in self.settings.items():
            put(tree, setting, value)
        for setting, key in self.fields.items():
            value = keys[key]
            put(tree, setting, float(value) if setting.rpartition(".")[2] in ("norm_eps", "scale") else value)
        self.read(keys, tree)
        listed = keys.check_rest(self.name, self.harmless, accepted)
        return decode(ModelConfig, tree), listed

    def hf_config(self, config: ModelConfig) -> dict[str, Any]:
        """config.json for a config of ours; UserError that names the setting if the family cannot say it."""
        content: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        content |= {key: allowed[0] for key, allowed in self.only.items()}
        content |= {key: get(config, setting) for setting, key in self.fields.items()}
        content |= self.write(config)
        again, _ = self.model_config(content)
        wrong = differences(config, again)
        if wrong:
            name, (wanted, would_be) = next(iter(wrong.items()))
            raise UserError(f"{self.name} cannot express model.{name}={wanted}: it would become {would_be}")
        return content

    def rules(self, config: ModelConfig) -> list[Rule]:
        """All rules with full names, in the order of the layers."""
        tables = self.layers(config)
        found = [rule.at("", "", 0) for rule in self.whole]
        for place, symbol in enumerate(symbols(config.pattern)):
            theirs = self.prefix.replace("{layer}", str(place // self.per_layer))
            found += [rule.at(f"layers.{place}.", theirs, config.moe.n_experts) for rule in tables[symbol]]
        return found


def put(tree: Tree, setting: str, value: Any) -> None:
    """Write a dotted setting into a tree."""
    *path, last = setting.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
    tree[last] = value


def get(config: ModelConfig, setting: str) -> Any:
    """The value of a dotted setting."""
    value: Any = config
    for name in setting.split("."):
        value = getattr(value, name)
    return value
