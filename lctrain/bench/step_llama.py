"""The other contender in `lctrain bench step`: transformers' LlamaForCausalLM of the same shape, at its best.

SDPA, no key/value cache, fused AdamW with the same decay groups, foreach clipping; bf16 by autocast over fp32 weights, which
is what its users train with and the same arithmetic as ours.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import time

import torch

from lctrain.bench.memory import peak_resident_mib, resident_mib
from lctrain.bench.step_ours import Step, random_batch, train_config
from lctrain.config.bench import StepBenchConfig
from lctrain.config.model import ModelConfig
from lctrain.devices import DTYPES
from lctrain.models.build import build_model
from lctrain.models.init import initialise
from lctrain.models.model import LanguageModel
from lctrain.models.pattern import parse_pattern
from lctrain.optim import make_adamw

# Name of each of our sublayers' matrices within a Llama layer.
_ATTENTION = {
    "norm": "input_layernorm",
    **{f"mixer.{x}": f"self_attn.{x}_proj" for x in "qkv"},
    "mixer.out": "self_attn.o_proj",
}
_MLP = {"norm": "post_attention_layernorm", **{f"mixer.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}}


def why_no_twin(model: ModelConfig) -> str | None:
    """Why transformers' Llama cannot stand beside this model here; None if it can."""
    version = _version()
    if version is None:
        return "transformers is not installed: pip install 'lctrain[hf]'"
    if int(version.partition(".")[0]) < 5:
        return f"transformers {version} is too old: pip install 'lctrain[hf]'"
    differs = _difference(model)
    return f"there is no Llama of this shape: {differs}" if differs else None


def _version() -> str | None:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None


def _difference(model: ModelConfig) -> str | None:
    symbols = "".join(layer.symbol for layer in parse_pattern(model.pattern))
    if not re.fullmatch(r"(\*-)+", symbols):
        return f"its layers are (*-){{n}}, not {model.pattern}"
    if model.mlp.activation != "swiglu":
        return f"its MLP is swiglu, not {model.mlp.activation}"
    if model.attention.qk_norm or model.attention.sinks:
        return "it has no QK-norm and no attention sinks"
    if model.attention.bias != model.attention.out_bias:
        return "its attention has a bias everywhere or nowhere"
    if model.attention.rope.scaling != "none":
        return "only plain rotary embedding is compared"
    return None


class Llama:
    """LlamaForCausalLM with our initial weights, fed with the same tokens, positions and labels as `Ours`."""

    def __init__(self, config: StepBenchConfig, seq: int) -> None:
        from transformers import LlamaForCausalLM

        self.after_import = resident_mib()
        settings = train_config(config, seq)
        assert settings.optim.clip_norm is not None
        self.dtype, self.clip_norm = DTYPES[config.dtype], settings.optim.clip_norm
        self.micro = random_batch(config, seq).micro_batches[0]
        ours = build_model(settings).to_empty(device="cpu")
        initialise(ours, config.seed)
        self.model = LlamaForCausalLM(llama_config(config.model, seq)).train()
        self.model.load_state_dict(llama_weights(ours))
        if config.activation_checkpointing == "layer":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # its name in every transformers 5
        self.optimizer = make_adamw(self.model, settings.optim)

    def step(self) -> Step:
        """Forward, backward, clipping and update."""
        start, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext():
            loss = self.loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        result = float(loss.detach()), float(norm)
        return Step(time.perf_counter() - start, time.process_time() - cpu, *result)

    def loss(self) -> torch.Tensor:
        """Mean loss over the targets."""
        # Llama finds several documents in their positions, but then writes the mask out, which one document does not need.
        packed = len(self.micro.borders[0]) > 2
        out = self.model(
            self.micro.tokens,
            position_ids=self.micro.positions if packed else None,
            labels=self.micro.labels,
            shift_labels=self.micro.labels,
            use_cache=False,
        )
        return out.loss

    def memory(self) -> tuple[float, float]:
        """MiB resident after the imports, and at the peak."""
        return self.after_import, peak_resident_mib()


def llama_config(model: ModelConfig, seq: int):
    """transformers' settings for the same shape."""
    from transformers import LlamaConfig

    attention = model.attention
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.mlp.d_ff,
        num_hidden_layers=len(parse_pattern(model.pattern)) // 2,
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_kv_heads,
        head_dim=attention.head_dim or model.d_model // attention.n_heads,
        max_position_embeddings=seq,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope.theta},
        tie_word_embeddings=model.tie_embeddings,
        attention_bias=attention.bias,
        mlp_bias=model.mlp.bias,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )


def llama_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Our weights under Llama's names."""
    weights: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output_weight,
    }
    for index, layer in enumerate(model.layers):
        names = _MLP if index % 2 else _ATTENTION
        for name, parameter in layer.named_parameters():
            module, _, leaf = name.rpartition(".")
            weights[f"model.layers.{index // 2}.{names[module]}.{leaf}"] = parameter
    return {name: weight.detach() for name, weight in weights.items()}
