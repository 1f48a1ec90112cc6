"""`E` against a loop over experts in fp64 and transformers' blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lctrain.config.model import ModelConfig
from lctrain.config.moe import BalanceConfig, MoeConfig, RouterConfig
from lctrain.models.moe.moe import MixtureOfExperts
from lctrain.verify.blocks import mlp
from lctrain.verify.blocks.compare import (
    LENGTH,
    Case,
    Errors,
    against_oracle,
    decoding,
    inputs,
    packed,
    packing,
    random_mixer,
    randomise,
    relative_error,
)
from lctrain.verify.blocks.huggingface import Tensors, compare_gradients, need_transformers, take_weights

D_MODEL = 32
NO_LOSS = BalanceConfig(switch=0.0)
BIAS = BalanceConfig(switch=0.0, bias_rate=0.001)
SETTINGS: dict[str, dict[str, Any]] = {
    "softmax, renormalised": {},
    "softmax, not renormalised": {"router": RouterConfig(renormalise=False)},
    "sigmoid, bias, scale": {"router": RouterConfig(score="sigmoid", scale=2.5), "balance": BIAS},
    "groups by two best": {"router": RouterConfig(groups=4, top_groups=2)},
    "groups by best": {"router": RouterConfig(groups=4, top_groups=2, group_score="max")},
    "one expert, gelu": {"top_k": 1, "activation": "gelu", "router": RouterConfig(renormalise=False)},
    "relu2": {"activation": "relu2"},
    "shared, gated": {"shared_d_ff": 24, "shared_gate": True},
    "widths that no grouped kernel takes": {"d_ff": 13},
}


def cases() -> Iterator[Case]:
    """Routers, experts, packing and decoding; four families of transformers."""
    for name, settings in SETTINGS.items():
        yield f"E loop, {name}", partial(_against_loop, settings)
    yield "E packing", lambda: packing(_mixer({}), D_MODEL)
    yield "E packing, capacity", lambda: packing(_mixer({"capacity_factor": 1.0}), D_MODEL)
    yield "E decoding", lambda: decoding(_mixer({"shared_d_ff": 24}), D_MODEL)
    for kind, make in (("Mixtral", _mixtral), ("Qwen2Moe", _qwen2), ("Qwen3Moe", _qwen3), ("DeepseekV3", _deepseek)):
        yield f"E transformers, {kind}", partial(_against_transformers, make)


def _mixer(settings: dict[str, Any]) -> MixtureOfExperts:
    moe = MoeConfig(**{"n_experts": 8, "top_k": 3, "d_ff": 16, "balance": NO_LOSS, **settings})
    mixer = random_mixer("E", ModelConfig(pattern="E", d_model=D_MODEL, vocab_size=8, moe=moe))
    assert isinstance(mixer, MixtureOfExperts)
    _set_bias(mixer)
    return mixer


@torch.no_grad()
def _set_bias(mixer: MixtureOfExperts, values: Tensor | None = None) -> None:
    """A buffer, not a parameter: values that change some tokens' experts."""
    if mixer.balancer.bias is not None:
        mixer.balancer.bias.copy_(torch.linspace(-0.3, 0.3, len(mixer.balancer.bias)) if values is None else values)


def _against_loop(settings: dict[str, Any]) -> Errors:
    mixer = _mixer(settings)
    return against_oracle(mixer, lambda x: by_loop(mixer, x), D_MODEL)


def by_loop(mixer: MixtureOfExperts, x: Tensor) -> Tensor:
    """The layer in fp64: every expert computes every token, and what the router gives the others is masked away."""
    x, settings = x.double(), mixer.settings
    weights = routing_by_formula(x @ mixer.router.weight.double().t(), settings, mixer.balancer.bias)
    y = torch.zeros_like(x)
    for expert in range(settings.n_experts):
        y = y + weights[..., expert, None] * _expert(mixer, expert, x)
    if mixer.shared is not None:
        shared = mlp.by_formula(mixer.shared, x)
        gate = mixer.shared_gate
        y = y + (shared if gate is None else shared * torch.sigmoid(x @ gate.weight.double().t()))
    return y


def routing_by_formula(logits: Tensor, settings: MoeConfig, bias: Tensor | None) -> Tensor:
    """The weight of every expert for every token, [..., E], most of them 0, from sorted scores."""
    router = settings.router
    scores = logits.softmax(-1) if router.score == "softmax" else logits.sigmoid()
    rank = scores.detach() if bias is None else scores.detach() + bias
    groups = rank.unflatten(-1, (router.groups, -1)).sort(-1, descending=True).values
    best = {"top2_sum": 2, "top_k_over_groups": settings.top_k // router.top_groups, "max": 1}[router.group_score]
    by_group = groups[..., :best].sum(-1)
    cut = by_group.sort(-1, descending=True).values[..., router.top_groups - 1, None]
    open_to = (by_group >= cut).repeat_interleave(settings.n_experts // router.groups, dim=-1)
    rank = rank.masked_fill(~open_to, -torch.inf)
    chosen = rank >= rank.sort(-1, descending=True).values[..., settings.top_k - 1, None]
    weights = scores * chosen
    return router.scale * (weights / weights.sum(-1, keepdim=True) if router.renormalise else weights)


def _expert(mixer: MixtureOfExperts, expert: int, x: Tensor) -> Tensor:
    experts = mixer.experts
    up = x @ experts.up[expert].double().t()
    if experts.gate is not None:
        hidden = F.silu(x @ experts.gate[expert].double().t()) * up
    else:
        hidden = F.gelu(up, approximate="tanh") if experts.activation == "gelu" else up.relu().square()
    return hidden @ experts.down[expert].double().t()


def _against_transformers(make: Any) -> Errors:
    need_transformers()
    theirs, settings = make()
    randomise(theirs, 3)
    ours = _mixer(settings)
    take_weights(ours, theirs, partial(_translate, ours=ours))
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(7)))
            _set_bias(ours, buffer)
    x, dy = inputs(D_MODEL)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, wanted = ours(leaves[0], packed(((0, LENGTH),) * len(x))), theirs(leaves[1])
    y.backward(dy)
    wanted.backward(dy)
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    found = {"y": relative_error(y, wanted), "dx": relative_error(leaves[0].grad, leaves[1].grad)}
    return {**found, **compare_gradients(ours, theirs, partial(_translate, ours=ours))}


def _translate(theirs: Tensors, ours: MixtureOfExperts) -> dict[str, Tensor]:
    gate, up = theirs["experts.gate_up_proj"].chunk(2, dim=1)
    found = {"router.weight": theirs["gate.weight"], "experts.gate": gate, "experts.up": up}
    found["experts.down"] = theirs["experts.down_proj"]
    if ours.shared is not None:
        prefix = next(name for name in theirs if name.startswith("shared_expert")).split(".")[0]
        found |= {f"shared.{name}.weight": theirs[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down")}
    if ours.shared_gate is not None:
        found["shared_gate.weight"] = theirs["shared_expert_gate.weight"]
    return found


def _mixtral() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D_MODEL, intermediate_size=16, num_local_experts=8, num_experts_per_tok=3)
    return MixtralSparseMoeBlock(_plain(config)), {}


def _qwen2() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    shape = {"hidden_size": D_MODEL, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    config = Qwen2MoeConfig(**shape, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False)
    settings = {"router": RouterConfig(renormalise=False), "shared_d_ff": 24, "shared_gate": True}
    return Qwen2MoeSparseMoeBlock(_plain(config)), settings


def _qwen3() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    shape = {"hidden_size": D_MODEL, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**shape, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True)
    return Qwen3MoeSparseMoeBlock(_plain(config)), {}


def _deepseek() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    shape = {"hidden_size": D_MODEL, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 2}
    config = DeepseekV3Config(**shape, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    router = RouterConfig(score="sigmoid", scale=2.5, groups=4, top_groups=2)
    return DeepseekV3MoE(_plain(config)), {"router": router, "shared_d_ff": 32, "balance": BIAS}


def _plain(config: Any) -> Any:
    config._experts_implementation = "eager"  # their loop over experts, not grouped_mm: the oracle is the plainest form
    return config
