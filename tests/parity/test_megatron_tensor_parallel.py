"""Layers whose matrices tp ranks divide compute what whole ones do: loss, every gradient, from the same initial weights."""

import pytest
import torch
import torch.distributed as dist

from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import RoutedHeadsConfig
from lctrain.launch.ranks import run_ranks
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel
from lctrain.models.parallel import ModelParallel
from lctrain.models.place import parameter_places, part_of, whole_of, whole_shape
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import IGNORE, SequenceLayout, document_positions, shift_labels
from lctrain.parallel.sequence import SequenceMeta

FULL = {"qk_norm": True, "bias": True, "out_bias": True, "sinks": True}
MODELS = {
    "multi-head": ModelConfig(
        pattern="*-",
        d_model=24,
        vocab_size=36,
        attention=AttentionConfig(n_heads=12, n_kv_heads=12),
        mlp=MlpConfig(d_ff=36),
    ),
    "one KV head, biases, norms, sinks, tied": ModelConfig(
        pattern="*-W-",
        d_model=24,
        vocab_size=36,
        tie_embeddings=True,
        attention=AttentionConfig(n_heads=12, n_kv_heads=1, head_dim=8, window=5, **FULL),
        mlp=MlpConfig(d_ff=36, activation="gelu", bias=True),
    ),
    "routed heads": ModelConfig(
        pattern="*-",
        d_model=24,
        vocab_size=36,
        attention=AttentionConfig(n_heads=6, n_kv_heads=2, head_dim=4, routed_heads=RoutedHeadsConfig(shared=1, top_k=2)),
        mlp=MlpConfig(d_ff=36),
    ),
    "a vocabulary that does not divide": ModelConfig(
        pattern="*-",
        d_model=24,
        vocab_size=37,
        attention=AttentionConfig(n_heads=12, n_kv_heads=12),
        mlp=MlpConfig(d_ff=36),
    ),
    "a tied vocabulary that does not divide": ModelConfig(
        pattern="*-",
        d_model=24,
        vocab_size=37,
        tie_embeddings=True,
        attention=AttentionConfig(n_heads=12, n_kv_heads=12),
        mlp=MlpConfig(d_ff=36),
    ),
    "two KV heads": ModelConfig(
        pattern="*-*-",
        d_model=24,
        vocab_size=36,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm=True),
        mlp=MlpConfig(d_ff=36, bias=True),
    ),
}


def run(model: ModelConfig, length: int, rows: int, parallel: ModelParallel, checkpointing: bool, dtype: torch.dtype):
    built = LanguageModel(model, dtype, checkpointing, parallel)
    initialise(built, 3)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.vocab_size, (rows, length), generator=generator)
    borders = tuple(tuple(sorted({0, length // (row + 2), length})) for row in range(rows))
    labels = shift_labels(tokens, borders, [None] * rows)
    seq = SequenceMeta(SequenceLayout("zigzag", 1, length), RankGroup(), document_positions(borders, length), borders)
    assert tokens.shape[1] == seq.layout.local_length
    sums = built(tokens, labels, seq, loss_chunk=7, z_weight=1e-3)
    (sums.objective / max(1, int((labels != IGNORE).sum()))).backward()
    return built, sums


def compare(rank: int, size: int, model: ModelConfig, length: int, rows: int, checkpointing: bool, dtype: torch.dtype):
    """Loss error and the worst relative gradient error of this rank's parts."""
    ours, sums = run(model, length, rows, ModelParallel(tp=RankGroup(dist.group.WORLD)), checkpointing, dtype)
    plain, expected = run(model, length, rows, ModelParallel(), False, dtype)
    places = parameter_places(ours)
    for name, parameter in ours.named_parameters():
        assert whole_shape(parameter.shape, places[name], ours.parallel) == plain.get_parameter(name).shape, name
        assert torch.equal(whole_of(parameter.detach(), places[name], ours.parallel), plain.get_parameter(name)), name
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert ours.state_dict().keys() == plain.state_dict().keys()
    errors = {}
    for name, parameter in ours.named_parameters():
        whole = plain.get_parameter(name)
        assert torch.equal(parameter, part_of(whole, places[name], ours.parallel)), name
        part = part_of(whole.grad, places[name], ours.parallel)
        errors[name] = float((parameter.grad - part).norm() / whole.grad.norm().clamp(min=1e-12))
    token_error = float((sums.per_token - expected.per_token).abs().max())
    return float((sums.cross_entropy - expected.cross_entropy).abs() / max(1, length)), token_error, errors


@pytest.mark.parametrize(
    ("name", "size", "length", "rows", "checkpointing"),
    [
        ("multi-head", 2, 16, 1, False),
        ("multi-head", 3, 13, 2, True),
        ("one KV head, biases, norms, sinks, tied", 2, 11, 1, False),
        ("one KV head, biases, norms, sinks, tied", 4, 13, 2, True),
        ("two KV heads", 2, 15, 2, False),
        ("a vocabulary that does not divide", 2, 13, 2, True),
        ("a vocabulary that does not divide", 3, 11, 1, False),
        ("a tied vocabulary that does not divide", 4, 13, 2, False),
        ("routed heads", 2, 13, 2, True),
        ("two KV heads", 4, 9, 1, False),
        ("two KV heads", 2, 2, 1, False),
    ],
)
def test_equal_to_whole_layers(name: str, size: int, length: int, rows: int, checkpointing: bool) -> None:
    for loss, token, errors in run_ranks(compare, size, MODELS[name], length, rows, checkpointing, torch.float32):
        assert loss < 1e-6
        assert token < 1e-5
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-5, f"{worst}: {errors[worst]:.1e}"


def test_half_precision_is_as_near_as_rounding() -> None:
    for loss, _, errors in run_ranks(compare, 2, MODELS["two KV heads"], 15, 2, False, torch.bfloat16):
        assert loss < 2e-2
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 4e-2, f"{worst}: {errors[worst]:.1e}"


def test_one_token_leaves_the_last_rank_with_padding() -> None:
    for _, token, errors in run_ranks(compare, 2, MODELS["two KV heads"], 1, 2, False, torch.float32):
        assert token < 1e-5
        assert max(errors.values()) < 1e-5
