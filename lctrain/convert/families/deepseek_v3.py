"""DeepSeek-V3: latent attention; experts chosen by sigmoid scores and a selection bias, and a shared part."""

from __future__ import annotations

from typing import Any

from lctrain.config.model import ModelConfig
from lctrain.convert.families import common
from lctrain.convert.family import Family, Tree, put
from lctrain.convert.function import symbols
from lctrain.convert.keys import Keys
from lctrain.convert.rules import Reordered, Rule, rotated_pairs, same
from lctrain.errors import UserError

BIAS_RATE = 0.001
"""With which DeepSeek-V3 was trained; a bias exists in our model only with a rate."""


def _read(keys: Keys, tree: Tree) -> None:
    dense = keys["first_k_dense_replace"]
    count = keys["num_hidden_layers"]
    put(tree, "pattern", common.layers(keys, "+", ["-"] * min(dense, count) + ["E"] * (count - dense)))
    put(tree, "moe.shared_d_ff", (keys.optional("n_shared_experts") or 0) * keys["moe_intermediate_size"])
    if keys["num_key_value_heads"] != keys["num_attention_heads"]:
        raise UserError(f"config.json has num_key_value_heads={keys['num_key_value_heads']}: latent attention has one per head")
    common.read_rope(keys, tree, "latent_attention.rope")


def _write(config: ModelConfig) -> dict[str, Any]:
    split = common.pairs(config, "deepseek_v3", "+", "-E")
    moe, latent = config.moe, config.latent_attention
    if moe.shared_d_ff % moe.d_ff:
        raise UserError(
            f"deepseek_v3 cannot express model.moe.shared_d_ff={moe.shared_d_ff}: no multiple of moe.d_ff={moe.d_ff}"
        )
    return {
        "num_hidden_layers": len(split),
        "first_k_dense_replace": sum(channel == "-" for _, channel in split),
        "n_shared_experts": moe.shared_d_ff // moe.d_ff,
        "num_key_value_heads": latent.n_heads,
        "qk_head_dim": latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        "head_dim": latent.qk_rope_head_dim,
        **common.rope(latent.rope),
    }


def _layers(config: ModelConfig) -> dict[str, list[Rule]]:
    latent = config.latent_attention
    names = {
        "q_down": "q_a_proj",
        "q_norm": "q_a_layernorm",
        "kv_norm": "kv_a_layernorm",
        "kv_up": "kv_b_proj",
        "out": "o_proj",
    }
    q_up = "q_proj" if latent.q_lora_rank is None else "q_b_proj"
    rotated = latent.qk_rope_head_dim
    attention = [
        same("norm.weight", "input_layernorm.weight"),
        *(same(f"mixer.{ours}.weight", f"self_attn.{theirs}.weight") for ours, theirs in names.items()),
        Rule(
            ("mixer.q_up.weight",),
            (f"self_attn.{q_up}.weight",),
            Reordered(latent.n_heads, rotated_pairs(latent.qk_nope_head_dim, rotated)),
        ),
        Rule(
            ("mixer.kv_down.weight",),
            ("self_attn.kv_a_proj_with_mqa.weight",),
            Reordered(1, rotated_pairs(latent.kv_lora_rank, rotated)),
        ),
    ]
    return {"+": attention, "-": common.mlp(), "E": common.mixture(shared="shared_experts")}


def _dropped(config: ModelConfig) -> dict[str, str]:
    return {f"model.layers.{len(symbols(config.pattern)) // 2}.": "multi-token prediction, which our blocks lack"}


FAMILY = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fields={
        **{"d_model": "hidden_size", "vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"},
        **{"norm_eps": "rms_norm_eps", "mlp.d_ff": "intermediate_size"},
        "latent_attention.n_heads": "num_attention_heads",
        **{f"latent_attention.{name}": name for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "latent_attention.qk_rope_head_dim": "qk_rope_head_dim",
        "moe.n_experts": "n_routed_experts",
        "moe.top_k": "num_experts_per_tok",
        "moe.d_ff": "moe_intermediate_size",
        "moe.router.scale": "routed_scaling_factor",
        "moe.router.groups": "n_group",
        "moe.router.top_groups": "topk_group",
        "moe.router.renormalise": "norm_topk_prob",
    },
    settings={
        "moe.router.score": "sigmoid",
        "moe.router.group_score": "top2_sum",
        "moe.balance.switch": 0.0,
        "moe.balance.sequence": 1e-4,
        "moe.balance.bias_rate": BIAS_RATE,
    },
    only={
        **common.NO_DROPOUT,
        "attention_bias": (False, None),
        "rope_interleave": (True, None),
        "rms_norm_eps": (1e-6,),  # transformers' norms of the latents have this one, whatever the key says
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "moe_layer_freq": (1, None),
        "ep_size": (1, None),
    },
    assumed={**common.ASSUMED, "rms_norm_eps": 1e-6, "first_k_dense_replace": 3, "norm_topk_prob": True},
    harmless=("qk_head_dim", "head_dim", "num_nextn_predict_layers", "aux_loss_alpha", "seq_aux"),
    read=_read,
    write=_write,
    whole=common.WHOLE,
    layers=_layers,
    dropped=_dropped,
)
