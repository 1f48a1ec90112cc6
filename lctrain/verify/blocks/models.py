"""Whole models against transformers' with the same random weights: every token's loss and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.latent_attention import LatentAttentionConfig
from lctrain.config.mamba import MambaConfig
from lctrain.config.model import AttentionConfig, MlpConfig, ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig, RouterConfig
from lctrain.config.rope import RopeConfig
from lctrain.models.mamba import Mamba2
from lctrain.models.model import LanguageModel
from lctrain.models.moe.moe import MixtureOfExperts
from lctrain.models.pattern import parse_pattern
from lctrain.verify.blocks.compare import LENGTH, Case, Errors, packed, randomise, relative_error
from lctrain.verify.blocks.huggingface import Tensors, compare_gradients, need_transformers, take_weights
from lctrain.verify.blocks.latent_attention import translate_deepseek
from lctrain.verify.blocks.mamba import translate_mamba2

D_MODEL, VOCAB, ROWS = 32, 64, 2
NO_BALANCE = BalanceConfig(switch=0.0)
"""Balancing losses are compared by themselves: transformers adds up all layers' shares first."""
LLAMA = AttentionConfig(n_heads=4, n_kv_heads=2)
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


class Twin(NamedTuple):
    """One of our models, and how to make transformers' of the same shape: class name, settings of its config."""

    ours: ModelConfig
    kind: str
    theirs: dict[str, Any]


def _config(pattern: str, **settings: Any) -> ModelConfig:
    settings = {"attention": LLAMA, "mlp": MlpConfig(d_ff=48), **settings}
    return ModelConfig(pattern=pattern, d_model=D_MODEL, vocab_size=VOCAB, norm_eps=1e-6, **settings)


def _twins() -> Iterator[Twin]:
    yield Twin(_config("*-*-"), "Llama", {"num_hidden_layers": 2})
    llama3 = RopeConfig(scaling="llama3", factor=8.0, original_max_position=16)
    scaled = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 16}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    stretched = _config("*-", attention=LLAMA.model_copy(update={"rope": llama3}))
    yield Twin(stretched, "Llama", {"num_hidden_layers": 1, "rope_parameters": scaled, "max_position_embeddings": 128})
    qk_norm = AttentionConfig(n_heads=4, n_kv_heads=2, qk_norm=True)
    yield Twin(_config("*-*-", attention=qk_norm), "Qwen3", {"num_hidden_layers": 2})
    window = AttentionConfig(n_heads=4, n_kv_heads=2, window=6)
    yield Twin(_config("W-W-", attention=window), "Mistral", {"num_hidden_layers": 2, "sliding_window": 6})
    moe = MoeConfig(n_experts=4, top_k=2, d_ff=48, balance=NO_BALANCE)
    yield Twin(_config("*E*E", moe=moe), "Mixtral", {"num_hidden_layers": 2, "num_local_experts": 4, "sliding_window": None})
    fine = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "norm_topk_prob": True}
    moe = MoeConfig(n_experts=8, top_k=3, d_ff=16, balance=NO_BALANCE)
    yield Twin(_config("*E*E", attention=qk_norm, moe=moe), "Qwen3Moe", {"num_hidden_layers": 2, **fine})
    yield _deepseek()
    yield _nemotron_h()


def _deepseek() -> Twin:
    latent = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_shared_experts": 1}
    groups = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 1}
    router = RouterConfig(score="sigmoid", scale=2.5, groups=4, top_groups=2)
    balance = BalanceConfig(switch=0.0, bias_rate=0.001)
    ours = _config(
        "+-+E",
        latent_attention=LatentAttentionConfig(n_heads=4, **latent),  # type: ignore[arg-type]
        moe=MoeConfig(n_experts=8, top_k=3, d_ff=16, shared_d_ff=16, router=router, balance=balance),
    )
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return Twin(ours, "DeepseekV3", {"num_hidden_layers": 2, "head_dim": 4, **heads, **latent, **experts, **groups})


def _nemotron_h() -> Twin:
    pattern = "M-M*-"
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    ours = _config(
        pattern,
        attention=AttentionConfig(n_heads=4, n_kv_heads=2, rotary=False),
        mamba=MambaConfig(head_dim=8, d_state=16, n_groups=2, chunk=16),
        mlp=MlpConfig(d_ff=48, activation="relu2"),
    )
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
    return Twin(
        ours, "NemotronH", {"layers_block_type": [names[symbol] for symbol in pattern], "layer_norm_epsilon": 1e-6, **mamba}
    )


def cases() -> Iterator[Case]:
    """One case per model."""
    for twin in _twins():
        yield (
            f"{twin.kind}, {twin.ours.pattern}" + (", llama3 rope" if "rope_parameters" in twin.theirs else ""),
            partial(_compare, twin),
        )


def _compare(twin: Twin) -> Errors:
    need_transformers()
    theirs, ours = _make_theirs(twin), LanguageModel(twin.ours)
    randomise(theirs, 3)
    translate = partial(_translate, twin=twin, ours=ours)
    take_weights(ours, theirs, translate)
    _share_selection_bias(ours, theirs)
    generator = torch.Generator().manual_seed(5)
    tokens, labels = (torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator) for _ in range(2))
    sums = ours(tokens, labels, packed(((0, LENGTH),) * ROWS))  # whole rows: documents are compared block by block
    sums.objective.backward()
    logits = theirs(input_ids=tokens, use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
    losses.sum().backward()
    return {"losses": relative_error(sums.per_token, losses), **compare_gradients(ours, theirs, translate)}


def _make_theirs(twin: Twin) -> nn.Module:
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()  # without mamba_ssm it warns that its torch path is slow; that is the one to compare with
    common: dict[str, Any] = {
        "hidden_size": D_MODEL,
        "vocab_size": VOCAB,
        "intermediate_size": 48,
        **_HEADS,
        "tie_word_embeddings": False,
    }
    common["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    common |= {"use_cache": False, "rms_norm_eps": 1e-6, "attn_implementation": "eager", **twin.theirs}
    config = getattr(transformers, f"{twin.kind}Config")(**common)
    made: nn.Module = getattr(transformers, f"{twin.kind}ForCausalLM")(config)
    return made.eval()


@torch.no_grad()
def _share_selection_bias(ours: LanguageModel, theirs: nn.Module) -> None:
    """Buffers, not parameters: values that change some tokens' experts."""
    biases = [buffer for name, buffer in theirs.named_buffers() if name.endswith("e_score_correction_bias")]
    mixtures = [
        module for module in ours.modules() if isinstance(module, MixtureOfExperts) and module.balancer.bias is not None
    ]
    for mixture, bias in zip(mixtures, biases, strict=True):
        bias.copy_(0.3 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(7)))
        assert mixture.balancer.bias is not None
        mixture.balancer.bias.copy_(bias)


def _translate(theirs: Tensors, twin: Twin, ours: LanguageModel) -> dict[str, Tensor]:
    """Our names for all of a model's tensors."""
    flat = twin.kind == "NemotronH"  # one sublayer per layer, as here; elsewhere a layer has two
    outer = {"embedding": "model.embeddings.weight" if flat else "model.embed_tokens.weight"}
    outer |= {"norm.weight": "model.norm_f.weight" if flat else "model.norm.weight", "head.weight": "lm_head.weight"}
    found = {name: theirs[their] for name, their in outer.items()}
    for symbol, place in parse_pattern(twin.ours.pattern):
        layer = f"model.layers.{place if flat else place // 2}."
        mixing = place % 2 == 0
        norm = "norm" if flat else "input_layernorm" if mixing else "post_attention_layernorm"
        found[f"layers.{place}.norm.weight"] = theirs[f"{layer}{norm}.weight"]
        prefix = layer + ("mixer." if flat else "self_attn." if mixing else "mlp.")
        mixer = _MIXERS[symbol](theirs, prefix, ours.layers[place].mixer)
        found |= {f"layers.{place}.mixer.{name}": tensor for name, tensor in mixer.items()}
    return found


def _attention(theirs: Tensors, prefix: str, mixer: Any) -> dict[str, Tensor]:
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
    if mixer.q_norm is not None:
        names |= {"q_norm": "q_norm", "k_norm": "k_norm"}
    return {f"{ours}.weight": theirs[f"{prefix}{name}.weight"] for ours, name in names.items()}


def _latent_attention(theirs: Tensors, prefix: str, mixer: Any) -> dict[str, Tensor]:
    return translate_deepseek(theirs, mixer.settings, prefix)


def _mamba(theirs: Tensors, prefix: str, mixer: Any) -> dict[str, Tensor]:
    assert isinstance(mixer, Mamba2)
    return translate_mamba2(theirs, mixer, prefix)


def _mlp(theirs: Tensors, prefix: str, mixer: Any) -> dict[str, Tensor]:
    names = ("gate", "up", "down") if mixer.gate is not None else ("up", "down")
    return {f"{name}.weight": theirs[f"{prefix}{name}_proj.weight"] for name in names}


def _experts(theirs: Tensors, prefix: str, mixer: Any) -> dict[str, Tensor]:
    gate, up = theirs[f"{prefix}experts.gate_up_proj"].chunk(2, dim=1)
    found = {"experts.gate": gate, "experts.up": up, "experts.down": theirs[f"{prefix}experts.down_proj"]}
    found["router.weight"] = theirs[f"{prefix}gate.weight"]
    if mixer.shared is not None:
        found |= {f"shared.{name}": t for name, t in _mlp(theirs, f"{prefix}shared_experts.", mixer.shared).items()}
    return found


_MIXERS: dict[str, Callable[[Tensors, str, Any], dict[str, Tensor]]] = {
    "*": _attention,
    "W": _attention,
    "+": _latent_attention,
    "M": _mamba,
    "-": _mlp,
    "E": _experts,
}
