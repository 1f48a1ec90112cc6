"""The whole model: against transformers, with and without checkpointing, token by token."""

import pytest
import torch
from torch import Tensor, nn

from lctrain.models.model import LanguageModel
from lctrain.parallel.layout import count_targets, shift_labels

LENGTH, VOCAB = 40, 61
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def run(model: LanguageModel, tokens: Tensor, documents, make_seq, **options: object):
    labels = shift_labels(tokens, documents, [None] * len(documents))
    sums = model(tokens, labels, make_seq(documents, tokens.shape[1]), **options)
    return sums, count_targets(labels)


def named_as_in_transformers(model: LanguageModel) -> dict[str, nn.Parameter]:
    """Our parameters under the names of a Llama, Qwen3 or Mistral of the pattern `(attention MLP){n}`."""
    names = {"embedding": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    for index in range(len(model.layers)):
        block = f"model.layers.{index // 2}"
        norm, inner, parts = (
            ("post_attention_layernorm", "mlp", {part: f"{part}_proj" for part in ("gate", "up", "down")})
            if index % 2
            else (
                "input_layernorm",
                "self_attn",
                {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"},
            )
        )
        names[f"layers.{index}.norm.weight"] = f"{block}.{norm}.weight"
        for part, theirs in parts.items():
            for kind in ("weight", "bias"):
                names[f"layers.{index}.mixer.{part}.{kind}"] = f"{block}.{inner}.{theirs}.{kind}"
    return {names[name]: parameter for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["Llama", "Llama tied", "Llama with bias", "Llama long", "Qwen3", "Mistral"])
def test_agrees_with_transformers(make_model, make_seq, name: str) -> None:
    """Loss and every gradient of one unpacked batch."""
    transformers = pytest.importorskip("transformers")
    if name == "Qwen3":
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE, head_dim=16))
        ours = make_model("(*-){2}", attention={"head_dim": 16, "qk_norm": True})
    elif name == "Mistral":
        theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE, sliding_window=6))
        ours = make_model("(W-){2}")
    elif name == "Llama with bias":
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True))
        ours = make_model("(*-){2}", attention={"bias": True, "out_bias": True}, mlp={"bias": True})
    elif name == "Llama long":
        rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**SHAPE, "rope_parameters": rope}, max_position_embeddings=64)
        )
        ours = make_model("(*-){2}", attention={"rope": {"scaling": "yarn", "factor": 4.0, "original_max_position": 16}})
    else:
        tied = name == "Llama tied"
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied))
        ours = make_model("(*-){2}", tie_embeddings=tied)
    mine = named_as_in_transformers(ours)
    parameters = dict(theirs.named_parameters())
    assert set(mine) == set(parameters)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(mine[key])

    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    sums, targets = run(ours, tokens, [(0, LENGTH)] * 2, make_seq, loss_chunk=16)
    (sums.objective / targets).backward()
    loss = theirs(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    assert targets == 2 * (LENGTH - 1)
    assert float(sums.cross_entropy) / targets == pytest.approx(float(loss.detach()), rel=1e-6)
    for key, parameter in parameters.items():
        error = float((mine[key].grad - parameter.grad).norm() / parameter.grad.norm())
        assert error < 2e-5, f"{key}: {error:.1e}"


@pytest.mark.parametrize("tied", [False, True])
def test_decoding_equals_forward(make_model, make_seq, tied: bool) -> None:
    """Every mixer, token by token after a prompt, in fp32."""
    model = make_model("*-W-*-", tie_embeddings=tied, attention={"qk_norm": True})
    tokens = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.hidden(tokens, make_seq([(0, 19)] * 2)) @ model.output_weight.T
    state, at = model.new_state(), 0
    for size in (7, 1, 1, 4, *(1,) * 6):
        at += size
        logits = model.decode(tokens[:, at - size : at], state)
        assert logits.shape == (2, VOCAB)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, whole[:, at - 1], atol=2e-5, rtol=1e-4)
    assert at == 19


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_nothing(make_model, make_seq, dtype: torch.dtype) -> None:
    documents = ((0, 11, 12, 40), (0, 33))
    tokens = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    results = []
    for checkpointing in (False, True):
        model = make_model("(*-){2}W-", dtype, checkpointing, attention={"qk_norm": True})
        sums, _ = run(model, tokens, documents, make_seq, z_weight=1e-3)
        sums.objective.backward()
        results.append([sums.objective.detach(), sums.per_token, *(p.grad for p in model.parameters())])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_checkpointing_keeps_only_the_inputs_of_sublayers(make_model, make_seq) -> None:
    saved: dict[bool, int] = {}
    tokens = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        model = make_model("(*-){4}", checkpointing=checkpointing)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.hidden(tokens, make_seq([(0, 64)]))
        saved[checkpointing] = sum(kept.values()) - sum(p.nbytes for p in model.parameters())
        del hidden
    assert saved[True] < saved[False] / 3


def test_packed_documents_lose_nothing_to_each_other(make_model, make_seq) -> None:
    """Per-token losses of packed rows are those of each document run alone."""
    model = make_model("(*-)W-", torch.float64)
    documents = ((0, 5, 6, 30), (0, 22))
    tokens = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    packed, _ = run(model, tokens, documents, make_seq)
    for row, borders in enumerate(documents):
        for start, end in zip((0, *borders[1:-1]), borders[1:], strict=True):
            alone, _ = run(model, tokens[row : row + 1, start:end], [(0, end - start)], make_seq)
            torch.testing.assert_close(packed.per_token[row, start:end], alone.per_token[0], atol=1e-12, rtol=1e-12)
    assert (packed.per_token[1, 22:] == 0).all()


def test_bf16_stays_near_fp32(make_model, make_seq) -> None:
    tokens = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    exact, targets = run(make_model("(*-){2}"), tokens, [(0, 64)], make_seq)
    model = make_model("(*-){2}", torch.bfloat16)
    sums, _ = run(model, tokens, [(0, 64)], make_seq)
    assert float(sums.cross_entropy) / targets == pytest.approx(float(exact.cross_entropy) / targets, rel=5e-3)
    sums.objective.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert sums.per_token.dtype == torch.float32


def test_one_token(make_model, make_seq) -> None:
    model = make_model("*-W-")
    sums, targets = run(model, torch.tensor([[3]]), [(0, 1)], make_seq)
    sums.objective.backward()
    assert targets == 0
    assert float(sums.cross_entropy) == 0
    assert all((p.grad == 0).all() for p in model.parameters())
