"""The schema is documented throughout, and every preset fits it."""

from __future__ import annotations

import pytest

from lctrain.config import schema as module
from lctrain.config.compose import Library
from lctrain.config.load import load
from lctrain.config.roots import ROOTS, schema_of
from lctrain.config.schema import TrainConfig
from lctrain.config.strict import Strict

SECTIONS = [
    item for item in vars(module).values() if isinstance(item, type) and issubclass(item, Strict) and item is not Strict
]
CHOICES = [(group, choice) for group in Library().groups() for choice in Library().choices(group)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_says_what_it_means(section):
    assert section.__doc__
    assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda item: str(item))
def test_every_preset_decodes(group, choice):
    extra = ["data.corpora.0.prefix=x"] if choice == "custom" else []
    config = load(TrainConfig, "train", [f"{group}={choice}", *extra])
    if group == "model":
        assert config.model.name == choice


def test_every_root_has_its_file_and_decodes():
    assert set(ROOTS) <= set(Library().roots())
    for root in ROOTS:
        assert isinstance(load(schema_of(root), root, []), schema_of(root))


def parameters(model):
    """Embedding and matrices, by hand; norms and biases are too few to matter."""
    head = model.attention.head_dim or model.d_model // model.attention.n_heads
    attention = 2 * model.d_model * head * (model.attention.n_heads + model.attention.n_kv_heads)
    mlp = 3 * model.d_model * model.mlp.d_ff
    from lctrain.models.pattern import parse_pattern

    layers = sum(mlp if layer.symbol == "-" else attention for layer in parse_pattern(model.pattern))
    return layers + model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("tiny", 0.00102), ("small", 0.0253), ("llama3_1b", 1.236), ("llama3_8b", 8.03), ("qwen3_8b", 8.19), ("mistral_7b", 7.24)],
)
def test_presets_have_the_published_size(name, billions):
    assert parameters(load(TrainConfig, "train", [f"model={name}"]).model) / 1e9 == pytest.approx(billions, rel=5e-3)
