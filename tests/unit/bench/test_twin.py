"""transformers' Llama in the benchmark computes the same function as our model, step after step."""

from __future__ import annotations

import pytest

from lctrain.bench.step_llama import Llama, why_no_twin
from lctrain.bench.step_ours import Ours
from lctrain.config.bench import StepBenchConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.rope import RopeConfig


def model(pattern="(*-){2}", attention=None, mlp=None, **settings):
    return ModelConfig(
        pattern=pattern,
        d_model=16,
        vocab_size=40,
        attention=AttentionConfig(**{"n_heads": 4, "n_kv_heads": 2, **(attention or {})}),
        mlp=MlpConfig(**{"d_ff": 24, **(mlp or {})}),
        **settings,
    )


BIASED = model(attention={"bias": True, "out_bias": True, "head_dim": 6}, mlp={"bias": True}, tie_embeddings=True)


@pytest.mark.parametrize(
    ("network", "settings", "allowed"),
    [
        (model(), {}, 1e-6),
        (model(), {"batch": 2, "activation_checkpointing": "layer"}, 1e-6),
        (model(), {"documents": (3, 30)}, 1e-6),
        (BIASED, {"documents": (4,)}, 1e-6),
        (model(), {"dtype": "bf16"}, 3e-3),
    ],
)
def test_losses_and_gradient_norms_stay_together(network, settings, allowed):
    config = StepBenchConfig(model=network, seq=(33,), steps=3, **settings)
    ours, llama = Ours(config, 33), Llama(config, 33)
    first = None
    for _ in range(config.steps):
        mine, theirs = ours.step(), llama.step()
        first = first or mine
        assert mine.loss == pytest.approx(theirs.loss, rel=allowed)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=30 * allowed)
    assert mine.loss < first.loss


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (model("(W-){2}", attention={"window": 4}), "(W-){2}"),
        (model("**-"), "**-"),
        (model(mlp={"activation": "gelu"}), "gelu"),
        (model(attention={"qk_norm": True}), "QK-norm"),
        (model(attention={"bias": True}), "bias"),
        (model(attention={"rope": RopeConfig(scaling="linear", factor=2.0)}), "rotary"),
    ],
)
def test_models_without_a_twin_are_named(network, reason):
    assert reason in why_no_twin(network)


def test_a_plain_model_has_a_twin():
    assert why_no_twin(model("*-(*-){3}")) is None
