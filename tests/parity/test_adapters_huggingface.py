"""Hugging Face decoders with their sequence over ranks against the same models, one document at a time on one process."""

from __future__ import annotations

import itertools
from importlib.util import find_spec

import pytest
import torch

from lctrain.adapters.huggingface import UnsupportedError, all_reduce_gradients, shard_batch, use_sequence_parallel_attention
from lctrain.launch.ranks import RankError, run_ranks
from lctrain.parallel.group import RankGroup

if find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import transformers

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 6},
    "Gemma3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    "GptOss": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 4},
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
    "DeepseekV3": {  # latent attention: value heads are smaller than key heads
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        **{"num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 2},
    },
}
DOCUMENTS = ((0, 3, 20, 37), (0, 30))  # 37 tokens split over neither 2 nor 3 ranks; the second row ends in padding


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on several threads, much slower on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(family: str, **changes):
    torch.manual_seed(1)
    name = f"{family}Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **FAMILIES[family], **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    for parameter in model.parameters():  # norms and biases too, so that no gradient is trivial
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def make_ids(step: int = 0) -> torch.Tensor:
    return torch.randint(SMALL["vocab_size"], (2, 37), generator=torch.Generator().manual_seed(100 + step))


def document_loss(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean over all targets, each document run by itself."""
    total, targets = torch.zeros(()), 0
    for row, borders in zip(ids, DOCUMENTS, strict=True):
        for start, end in itertools.pairwise(borders):
            document = row[None, start:end]
            total = total + model(document, labels=document).loss * (end - start - 1)
            targets += end - start - 1
    return total / targets


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sharded_gradients(rank: int, world_size: int, family: str, checkpointing: bool | None, layout: str, strategy: str):
    """Loss and gradients with the sequence over `world_size` ranks; checkpointing: None, reentrant or not."""
    group = RankGroup(torch.distributed.group.WORLD)
    model = use_sequence_parallel_attention(make_model(family))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    ids = make_ids()
    batch = shard_batch(ids, ids, group=group, documents=DOCUMENTS, layout=layout, strategy=strategy)
    loss = model(**batch).loss
    loss.backward()
    all_reduce_gradients(model, group)
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return total, gradients(model)


def assert_same(found, family: str) -> None:
    model = make_model(family)
    loss = document_loss(model, make_ids())
    loss.backward()
    expected = gradients(model)
    for total, grads in found:
        assert abs(total - loss) < 1e-6
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            error = (grad - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-8)
            assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_per_document_runs(family, world_size):
    assert_same(run_ranks(sharded_gradients, world_size, family, None, "zigzag", "ring"), family)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_sees_the_same_sequence_again(reentrant):
    assert_same(run_ranks(sharded_gradients, 2, "Mistral", reentrant, "zigzag", "ring"), "Mistral")


@pytest.mark.parametrize(("layout", "strategy"), [("contiguous", "all_gather"), ("striped", "ring"), ("balanced", "ulysses")])
def test_other_layouts_and_strategies(layout, strategy):
    assert_same(run_ranks(sharded_gradients, 3, "Mistral", None, layout, strategy), "Mistral")


def sharded_losses(rank: int, world_size: int, family: str, steps: int) -> list[float]:
    """Losses of training steps with the sequence over `world_size` ranks."""
    group = RankGroup(torch.distributed.group.WORLD)
    model = use_sequence_parallel_attention(make_model(family))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        ids = make_ids(step)
        loss = model(**shard_batch(ids, ids, group=group, documents=DOCUMENTS)).loss
        loss.backward()
        all_reduce_gradients(model, group)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses


@pytest.mark.parametrize(("family", "world_size"), [("Llama", 2), ("Qwen3", 3), ("Mistral", 2)])
def test_ten_steps_have_the_same_losses(family, world_size):
    found = run_ranks(sharded_losses, world_size, family, 10)
    model = make_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    expected = []
    for step in range(10):
        loss = document_loss(model, make_ids(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for losses in found:
        assert losses == pytest.approx(expected, abs=1e-5)
    assert expected[-1] != pytest.approx(expected[0], abs=1e-2), "the model does not learn; the comparison shows nothing"


def two_models(rank: int, world_size: int) -> bool:
    """Two models run interleaved, each with its own documents, recomputing in backward: same gradients as one by one."""
    group = RankGroup(torch.distributed.group.WORLD)
    ids = make_ids()
    batches = [shard_batch(ids, ids, group=group, documents=d) for d in (DOCUMENTS, ((0, 37), (0, 10, 37)))]
    alone = []
    for batch in batches:
        model = use_sequence_parallel_attention(make_model("Llama"))
        model(**batch).loss.backward()
        alone.append(gradients(model))
    models = [use_sequence_parallel_attention(make_model("Llama")) for _ in batches]
    for model in models:
        model.gradient_checkpointing_enable()
    losses = [model(**batch).loss for model, batch in zip(models, batches, strict=True)]
    for loss in reversed(losses):
        loss.backward()
    return all(
        torch.allclose(grad, expected[name], atol=1e-7)
        for model, expected in zip(models, alone, strict=True)
        for name, grad in gradients(model).items()
    )


def test_two_models_do_not_mix_up_their_sequences():
    assert run_ranks(two_models, 2) == [True, True]


def different_batches(rank: int, world_size: int) -> None:
    """Each rank brings its own rows."""
    shard_batch(make_ids(rank), group=RankGroup(torch.distributed.group.WORLD))


def test_ranks_with_different_batches_are_refused():
    with pytest.raises(RankError, match="differs from another rank's"):
        run_ranks(different_batches, 2)


def test_documents_can_be_told_in_three_ways():
    ids, group = make_ids()[:1], RankGroup()
    positions = torch.cat([torch.arange(3), torch.arange(17), torch.arange(17)])[None]
    ways = [{"documents": DOCUMENTS[:1]}, {"position_ids": positions}, {"cu_seqlens": torch.tensor(DOCUMENTS[0])}]
    batches = [shard_batch(ids, ids, group=group, **way) for way in ways]
    for batch in batches:
        assert batch["sequence"].documents == DOCUMENTS[:1]
        assert torch.equal(batch["position_ids"], positions)
        assert torch.equal(batch["labels"], batches[0]["labels"])
        assert batch["num_items_in_batch"] == 34


def test_one_token_and_no_target():
    model = use_sequence_parallel_attention(make_model("Llama"))
    ids = torch.zeros(1, 1, dtype=torch.long)
    loss = model(**shard_batch(ids, ids, group=RankGroup())).loss
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": [(0, 5)]}, "1 rows, the batch has 2"),
        ({"documents": [(0, 5), (0, 38)]}, "at most 37"),
        ({"documents": [(0, 5, 5), (0, 37)]}, "must rise"),
        ({"cu_seqlens": [0, 37]}, "one row"),
        ({"documents": DOCUMENTS, "position_ids": torch.arange(74).view(2, 37)}, "one way"),
        ({"position_ids": torch.arange(37)}, "shape of input_ids"),
        ({"labels": torch.zeros(2, 36)}, "shape of input_ids"),
        ({"layout": "zigzig"}, "zigzig"),
    ],
)
def test_bad_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        shard_batch(make_ids(), group=RankGroup(), **arguments)


def build(name: str, **config):
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**SMALL, **config}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("Qwen3Next", num_experts=4), "convolutions and recurrences"),
        (lambda: build("Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8), "convolutions and recurrences"),
        (lambda: build("Llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (lambda: build("Mixtral", output_router_logits=True), "auxiliary loss"),
        (lambda: build("Llama", attn_implementation="eager", output_attentions=True), "output_attentions"),
        (lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SMALL)), "ForSequenceClassification"),
    ],
)
def test_models_that_cannot_be_split_are_refused(make, message):
    with pytest.raises(UnsupportedError, match=message):
        use_sequence_parallel_attention(make())


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: build("Gemma2"), {}, "'softcap'.*attn_logit_softcapping=None"),
        (lambda: build("Doge", keep_window_size=4), {}, "as a tensor"),
        (lambda: build("Llama", attention_dropout=0.1), {}, "dropout 0.1"),
        (lambda: build("Llama"), {"attention_mask": torch.tensor([[1] * 36 + [0]] * 2)}, "padding masks"),
        (lambda: build("Llama"), {"attention_mask": torch.zeros(2, 1, 37, 37)}, "masks given as a tensor"),
        (lambda: build("Llama"), {"output_attentions": True}, "'output_attentions'"),
        (lambda: build("Llama"), {"unheard_of": 3}, "'unheard_of'"),
        (lambda: build("Llama", is_causal=False), {}, "bidirectional"),
    ],
)
def test_what_attention_cannot_do_is_refused(make, arguments, message):
    model = use_sequence_parallel_attention(make())
    with pytest.raises(UnsupportedError, match=message):
        model(**{**shard_batch(make_ids(), group=RankGroup()), **arguments})


def test_chunked_and_overlaid_masks_are_refused():
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    config = use_sequence_parallel_attention(make_model("Llama")).config
    config.attention_chunk_size = 4
    common = {"config": config, "inputs_embeds": torch.zeros(1, 8, 4), "attention_mask": None, "past_key_values": None}
    assert create_causal_mask(**common, position_ids=torch.tensor([[0, 1, 0, 1, 2, 5, 6, 7]])) is None
    with pytest.raises(UnsupportedError, match="chunked_overlay"):
        create_chunked_causal_mask(**common)
    with pytest.raises(UnsupportedError, match="or_masks"):
        create_causal_mask(**common, or_mask_function=lambda b, h, q, k: q >= 0)


def test_a_cache_in_use_and_a_call_without_a_batch_are_refused():
    model = use_sequence_parallel_attention(make_model("Llama"))
    batch = {**shard_batch(make_ids(), group=RankGroup()), "use_cache": True}
    cache = model(**batch).past_key_values
    with pytest.raises(UnsupportedError, match="key-value caches"):
        model(**batch, past_key_values=cache)
    with pytest.raises(ValueError, match="shard_batch"):
        model(make_ids())
