"""A megatron-core GPTModel with its sequence over context-parallel ranks against megatron's own attention on one process."""

from __future__ import annotations

import itertools
import os
from importlib.util import find_spec

import pytest

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron decorates with torch.compile; this halves its import

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from lctrain.adapters.gradients import all_reduce_gradients
from lctrain.adapters.megatron import SequenceParallelAttention, use_sequence_parallel_attention
from lctrain.adapters.megatron_cpu import megatron_on_cpu
from lctrain.adapters.unsupported import UnsupportedError
from lctrain.launch.ranks import run_ranks
from lctrain.parallel.group import RankGroup
from lctrain.parallel.layout import SequenceLayout

LENGTH, VOCAB = 48, 40
BORDERS = (0, 8, 28, 48)
SETTINGS = {
    **{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48},
    **{"attention_dropout": 0.0, "hidden_dropout": 0.0, "normalization": "RMSNorm", "add_bias_linear": False},
    **{"gated_linear_unit": True, "use_cpu_initialization": True},
}


def make_model(cp: int, **changes) -> GPTModel:
    """A tiny GPTModel, the same on every rank and for every cp; with megatron's own attention at cp=1."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(1)
    config = TransformerConfig(**{**SETTINGS, **changes}, context_parallel_size=cp)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if cp > 1:
        spec = use_sequence_parallel_attention(spec)
    return GPTModel(config, spec, VOCAB, LENGTH, position_embedding_type="rope")


def make_ids(step: int) -> torch.Tensor:
    return torch.randint(VOCAB // 4, (2, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def train(rank: int, cp: int, changes: dict, steps: int):
    """Losses of training steps and the last step's gradients."""
    with megatron_on_cpu():
        model = make_model(cp, **changes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        group = RankGroup(parallel_state.get_context_parallel_group())
        layout = SequenceLayout("zigzag", cp, LENGTH)
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            ids = make_ids(step)
            tokens, labels, positions = (
                layout.shard(x, group.rank, 1) for x in (ids[:, :-1], ids[:, 1:], torch.arange(LENGTH).expand(2, -1))
            )
            loss = model(tokens, positions, None, labels=labels).sum() / (2 * LENGTH)
            loss.backward()
            all_reduce_gradients(model, group)
            optimizer.step()
            total = loss.detach().clone()
            torch.distributed.all_reduce(total)
            losses.append(total.item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        error = (grad - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("cp", "changes"),
    [
        (2, {}),
        (3, {"num_query_groups": 1}),
        (2, {"window_size": (10, 0), "window_attn_skip_freq": 2}),
    ],
)
def test_loss_and_gradients(cp, changes):
    ((expected, gradients),) = run_ranks(train, 1, changes, 1)
    for losses, found in run_ranks(train, cp, changes, 1):
        assert losses == pytest.approx(expected, abs=1e-6)
        assert_same_gradients(found, gradients)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
)
def test_recomputing_layers_changes_nothing(recompute):
    (losses, expected), _ = run_ranks(train, 2, {}, 1)
    for found, gradients in run_ranks(train, 2, recompute, 1):
        assert found == losses
        assert_same_gradients(gradients, expected)


def test_ten_steps_have_the_same_losses():
    ((expected, _),) = run_ranks(train, 1, {}, 10)
    for losses, _ in run_ranks(train, 2, {}, 10):
        assert losses == pytest.approx(expected, abs=1e-5)
    assert expected[-1] != pytest.approx(expected[0], abs=1e-2), "the model does not learn; the comparison shows nothing"


def packed(rank: int, cp: int, form: str):
    """Gradients of a row of packed documents; at cp=1 with megatron's attention, one document at a time."""
    with megatron_on_cpu():
        model = make_model(cp)
        ids = make_ids(0)[:1]
        tokens, labels, positions = ids[:, :-1], ids[:, 1:], torch.arange(LENGTH)[None]
        documents = list(itertools.pairwise(BORDERS))
        if form == "alone":
            for start, end in documents:
                part = slice(start, end)
                (model(tokens[:, part], positions[:, : end - start], None, labels=labels[:, part]).sum() / LENGTH).backward()
        else:
            rank_of = parallel_state.get_context_parallel_rank()
            cuts = [(0, LENGTH)] if form == "sbhd" else documents
            at = torch.cat([start + SequenceLayout("zigzag", cp, end - start).indices(rank_of) for start, end in cuts])
            borders = torch.tensor(BORDERS, dtype=torch.int32)
            longest = max(end - start for start, end in cuts)
            params = PackedSeqParams(form, borders, borders, max_seqlen_q=longest, max_seqlen_kv=longest)
            loss = model(tokens[:, at], positions[:, at], None, labels=labels[:, at], packed_seq_params=params)
            (loss.sum() / LENGTH).backward()
        all_reduce_gradients(model, RankGroup(parallel_state.get_context_parallel_group()))
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("form", ["sbhd", "thd"])
def test_packed_documents_equal_per_document_runs(form):
    (expected,) = run_ranks(packed, 1, "alone")
    for found in run_ranks(packed, 2, form):
        assert_same_gradients(found, expected)


def refusals(rank: int, world_size: int) -> list[str]:
    """The message of everything that must be refused."""
    messages = []

    def attempt(changes: dict, call: dict, **init) -> None:
        try:
            config = TransformerConfig(**{**SETTINGS, **changes})
            kind = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", **init}
            attention = SequenceParallelAttention(config, 1, **kind)
            q = torch.zeros(4, 1, 4, 8)
            kv = torch.zeros(4, 1, 2, 8)
            attention(**{"query": q, "key": kv, "value": kv, "attention_mask": None, **call})
        except UnsupportedError as error:
            messages.append(str(error))

    with megatron_on_cpu():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel()
        attempt({}, {}, attention_type="cross")
        attempt({"attention_dropout": 0.1}, {})
        attempt({"softmax_type": "learnable"}, {})
        attempt({"window_size": (4, 2)}, {})
        attempt({"qk_clip": True}, {})
        attempt({}, {}, attn_mask_type=AttnMaskType.padding)
        attempt({"window_size": (4, 0)}, {}, attn_mask_type=AttnMaskType.no_mask)
        attempt({}, {"attention_mask": torch.zeros(1, 1, 4, 4)})
        attempt({}, {"attention_bias": torch.zeros(1, 1, 4, 4)})
        attempt({}, {"key": torch.zeros(9, 1, 2, 8), "value": torch.zeros(9, 1, 2, 8)})
        attempt({}, {"value": torch.zeros(4, 1, 2, 4)})
        attempt({}, {"packed_seq_params": PackedSeqParams("bshd")})
        attempt({}, {})  # and what can be done is done
    return messages


def test_what_it_cannot_do_is_refused_by_name():
    (messages,) = run_ranks(refusals, 1)
    expected = ["cross", "dropout 0.1", "'learnable'", "looks ahead", "qk_clip", "type padding", "without a causal mask"]
    expected += ["as a tensor", "attention_bias", "caches", "latent attention", "'bshd'"]
    assert len(messages) == len(expected)
    for message, word in zip(messages, expected, strict=True):
        assert word in message


def draws(rank: int, world_size: int) -> list[list[float]]:
    """Random numbers of two forks of megatron's tracker, and of the first one again after seeding anew."""
    found = []
    with megatron_on_cpu():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel()
        for seeding in range(2):
            torch.rand(seeding + 1)  # whatever was drawn before does not matter
            model_parallel_cuda_manual_seed(5, force_reset_rng=True)
            for _ in range(2 - seeding):
                outside = torch.get_rng_state()
                with get_cuda_rng_tracker().fork():
                    found.append(torch.rand(3).tolist())
                assert torch.equal(torch.get_rng_state(), outside)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the compatibility layer does nothing")
def test_random_streams_of_the_compatibility_layer():
    ((first, second, again),) = run_ranks(draws, 1)
    assert first == again != second


def test_specs_are_copied_not_changed():
    spec = get_gpt_layer_local_spec()
    before = spec.submodules.self_attention.submodules.core_attention
    ours = use_sequence_parallel_attention(spec, "all_gather").submodules.self_attention.submodules.core_attention
    assert (ours.module, ours.params) == (SequenceParallelAttention, {"strategy": "all_gather"})
    assert spec.submodules.self_attention.submodules.core_attention is before
    with pytest.raises(ValueError, match="core_attention"):
        use_sequence_parallel_attention(ours)


def test_every_layer_of_a_block_spec_is_replaced():
    with megatron_on_cpu():
        block = use_sequence_parallel_attention(
            get_gpt_decoder_block_spec(TransformerConfig(**SETTINGS), use_transformer_engine=False, pp_rank=0)
        )
    found = [layer.submodules.self_attention.submodules.core_attention.module for layer in block.layer_specs]
    assert found == [SequenceParallelAttention] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the compatibility layer does nothing")
def test_the_compatibility_layer_ends_with_its_block():
    with megatron_on_cpu():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
